"""What a run will cost, by arithmetic and before anything is allocated."""

from dataclasses import dataclass

from octavo.config import Config
from octavo.model.counts import cache_bytes, count_parameters, flops_per_token
from octavo.training.task import Task

BYTES_A_PARAMETER = 16  # fp32 weight, gradient and AdamW's two averages, for each parameter
TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022: where compute is best spent


@dataclass(frozen=True)
class Plan:
    """The figures of a planned run; sizes in bytes."""

    parameters: dict[str, int]
    parameters_total: int
    tokens_in_text: int
    tokens_a_step: int
    tokens_in_all: int
    epochs: float
    tokens_a_parameter: float
    flops_a_token: int
    training_flops: float
    weights_bytes: int
    checkpoint_bytes: int
    training_state_bytes: int
    kv_cache_bytes: int
    remarks: list[str]


def make_plan(task: Task) -> Plan:
    """Count everything that the configuration and the text decide."""
    config = task.config
    count = count_parameters(config.model)
    tokens_a_step = config.train.batch_size * config.model.block_size
    tokens_in_all = tokens_a_step * config.train.max_steps
    epochs = tokens_in_all / task.data["tokens"]
    flops = flops_per_token(config.model)
    return Plan(
        parameters=vars(count),
        parameters_total=count.total,
        tokens_in_text=task.data["tokens"],
        tokens_a_step=tokens_a_step,
        tokens_in_all=tokens_in_all,
        epochs=epochs,
        tokens_a_parameter=tokens_in_all / count.total,
        flops_a_token=flops,
        training_flops=3.0 * flops * tokens_in_all,
        weights_bytes=4 * count.total,
        checkpoint_bytes=12 * count.total,
        training_state_bytes=BYTES_A_PARAMETER * count.total,
        kv_cache_bytes=cache_bytes(config.model),
        remarks=_remarks(config, epochs, task.data["tokens"] / count.total),
    )


def _remarks(config: Config, epochs: float, text_tokens_a_parameter: float) -> list[str]:
    remarks = []
    if epochs < 1:
        remarks.append(f"the run sees {epochs:.0%} of the text: more steps would see the rest")
    if epochs > 20 and config.model.dropout == 0:
        remarks.append(
            f"{epochs:.0f} epochs without dropout: expect overfitting; "
            "try model.dropout=0.1 or fewer steps"
        )
    if text_tokens_a_parameter < 1:
        remarks.append(
            f"{text_tokens_a_parameter:.2f} tokens of text a parameter "
            f"(about {TOKENS_A_PARAMETER} is usual): a smaller model would do as well"
        )
    return remarks
