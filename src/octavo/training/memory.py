"""How much memory training takes, by arithmetic and before anything is allocated.

A step holds weights and the optimizer's averages all the time; activations from the forward pass
until the backward pass has used them, block by block; and gradients from then until the update. It
is fullest either where the backward pass begins, with every activation and the logits' gradient in
memory, or where it ends, with every gradient there. Tests hold these formulas to what autograd
keeps and to what a process grows by. Shapes: B rows of T tokens, N = B T, D, F, V as in the model.
"""

import dataclasses
from dataclasses import dataclass

from octavo.config import Config, ModelConfig
from octavo.generating.native import available_memory
from octavo.model.counts import count_parameters

FP32 = 4  # bytes: weights, gradients, averages and everything on the residual stream
VALIDATED = 16_384  # tokens that `score_windows` takes at once
ROOM = 0.9  # of what is free may be planned with
MUON_COPIES = 4  # of the largest group of equal matrices, while they are made orthogonal
LOGITS = 2**23  # that exist at once in fp32, where the configuration does not say how many rows
BF16_KERNELS = 16_000_000  # bytes of code and buffers of a thread, where a CPU multiplies bfloat16


@dataclass(frozen=True)
class Memory:
    """Bytes, each part at its largest; ``step`` and ``validation`` are what is there at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    step: int
    validation: int

    @property
    def peak(self) -> int:
        """The most that the run needs at any moment."""
        return max(self.step, self.validation)


@dataclass(frozen=True)
class Conditions:
    """What else decides: the device, autocast to two bytes, rows shorter than block_size, how many
    parameters are trained where not all are, and whether the number of CPU threads is even.
    """

    device: str = "cpu"
    half: bool = False
    width: int = 0
    trainable: int = 0
    even: bool = False

    @property
    def small(self) -> int:
        """Bytes of a number that goes through a matrix product."""
        return 2 if self.half else FP32


def training_memory(config: Config, conditions: Conditions) -> Memory:
    """What ``config`` needs above the process that trains it; the vocabulary must be known.

    The base of adapters counts as weights; their activations are counted as if all were trained,
    which is a little too much.
    """
    from octavo.training.halves import goes_in_halves

    model, train, small = config.model, config.train, conditions.small
    count = count_parameters(model)
    trainable = conditions.trainable or count.total
    T = conditions.width or model.block_size
    N = train.micro_batch_size * T
    parts = 1 + (conditions.even and goes_in_halves(config, conditions.device, T))
    frozen = count.total if config.lora.rank or config.finetune.head_only else 0
    weights = FP32 * (frozen + trainable)
    gradients = FP32 * trainable
    optimizer = FP32 * _averages(config, trainable)
    embedding = FP32 * count.token_embedding
    block = N * kept_by_block(model, T, conditions)
    ends = N * kept_outside_blocks(model, conditions)
    if config.data.mask_documents:
        ends += N * T * (1 + FP32)  # which token may look where, as booleans and as numbers
    if conditions.half:  # autocast's copies of the matrices
        ends += small * (count.attention + count.mlp + model.vocab_size * model.d_model)
    activations = model.n_layer * block + ends
    working = N * _working(model, T, conditions)
    if train.grad_checkpoint:  # of each block its input alone, and one block computed again
        activations = N * model.n_layer * FP32 * model.d_model + ends
        working += block
    logits, beside = (parts * found for found in _logits(config, N // parts, conditions))
    head = logits + beside * embedding
    waiting = gradients * (train.grad_accum > 1)  # those of earlier passes, and in halves apart
    begin = activations + max(head, embedding + working) + waiting
    end = gradients + (parts - 1) * waiting + block + ends + embedding
    validated = min(max(VALIDATED // T, 1), config.eval.windows) * T
    scoring = max(2 * FP32 * model.vocab_size, _working(model, T, conditions))
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        step=weights
        + optimizer
        + max(begin, end, gradients + _updating(config))
        + parts * _kernels(config, conditions),
        validation=weights + optimizer + validated * scoring,
    )


def kept_by_block(model: ModelConfig, T: int, conditions: Conditions) -> int:
    """Bytes a token that one block keeps for its backward pass."""
    small, fused = conditions.small, conditions.device != "cpu"
    D, A, K = model.d_model, model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    norm = _kept_by_norm(model, D, conditions)
    # The two sublayers' norms, and what goes into q, k, v and the MLP: autocast casts it for each.
    total = 2 * norm + small * D * ((5 if model.gated else 4) if conditions.half else 2)
    if model.norm_position == "sandwich":
        total += 2 * norm
    if model.qk_norm:
        total += (A + K) * (small if fused else 2 * FP32)
    if model.dropout and not fused:  # no fused attention then: q, k, v, out; weights thrice
        total += small * (4 * A + 3 * model.n_head * T)
    else:  # q, out, k, v, and the softmax's sums; after RoPE out is put into another order
        total += small * ((3 if model.uses_rope else 2) * A + 2 * K) + FP32 * model.n_head
    if model.dropout:  # what was dropped, of each sublayer's output
        total += 2 * D * (1 if fused else small)
    widths = {"relu": 1, "swiglu": 4, "geglu": 4}.get(model.mlp, 2)  # in, act, up, their product
    return total + small * widths * model.d_ff


def kept_outside_blocks(model: ModelConfig, conditions: Conditions) -> int:
    """Bytes a token that embedding, final norm and head keep; the logits are counted apart."""
    D = model.d_model
    final = 0 if model.norm_position == "post" else _kept_by_norm(model, D, conditions)
    dropped = D * (1 if conditions.device != "cpu" else FP32) if model.dropout else 0
    return final + conditions.small * D + dropped


def _kept_by_norm(model: ModelConfig, width: int, conditions: Conditions) -> int:
    """The input; on CPUs, where PyTorch has no fused RMSNorm, the normalized input too."""
    copies = 2 if model.norm == "rmsnorm" and conditions.device == "cpu" else 1
    return FP32 * (copies * width + 1)


def _working(model: ModelConfig, T: int, conditions: Conditions) -> int:
    """Bytes a token of gradients in flight through a block, at its widest place.

    In fp32 under autocast too, which casts back and forth.
    """
    mlp = (3 if model.gated else 2) * model.d_ff
    attention = 4 * model.n_head * model.head_dim
    if model.dropout and conditions.device == "cpu":
        attention += 2 * model.n_head * T
    return FP32 * (max(mlp, attention) + 2 * model.d_model)


def rows_at_once(vocab_size: int) -> int:
    """Rows of logits in one piece."""
    return max(LOGITS // vocab_size, 16)


def _logits(config: Config, N: int, conditions: Conditions) -> tuple[int, int]:
    """The logits of as many rows as exist at once, with their copies and gradients; and how many
    tensors as large as the head lie beside them.
    """
    from octavo.linear import onednn_pays

    V, chunk = config.model.vocab_size, config.train.loss_chunk
    rows = min(chunk or (N if conditions.half else rows_at_once(V)), N)
    if rows == N:  # the log-softmax and two gradients
        copies, beside = 3, 0
    elif conditions.half:  # computed again, and each piece adds its gradient
        copies, beside = 4, 3
    else:  # the gradient, and the head turned round for both products
        copies, beside = 2, 3 if conditions.device == "cpu" and onednn_pays() else 1
    return copies * FP32 * rows * V, beside


def _averages(config: Config, trainable: int) -> int:
    """Numbers the optimizer keeps: AdamW two a parameter, Muon one for the blocks' matrices."""
    if config.optim.name != "muon" or config.lora.rank:
        return 2 * trainable
    count = count_parameters(dataclasses.replace(config.model, bias=False))
    return 2 * trainable - count.attention - count.mlp


def _updating(config: Config) -> int:
    """Bytes that come and go in the update: Muon works on all matrices of one shape together."""
    if config.optim.name != "muon":
        return 0
    model = config.model
    widest = model.d_model * model.d_ff * (2 if model.gated else 1)
    return FP32 * MUON_COPIES * model.n_layer * max(widest, 4 * model.d_model**2)


def _kernels(config: Config, conditions: Conditions) -> int:
    """Bytes that stay with a thread from its first update on."""
    from octavo.training.muon import multiplies_bf16

    on_cpu = config.optim.name == "muon" and conditions.device == "cpu"
    return BF16_KERNELS if on_cpu and multiplies_bf16("cpu") else 0


def arrangements(config: Config) -> list[Config]:
    """The same step in every micro-batch size that divides its rows, largest first."""
    rows = config.train.batch_size
    return [with_micro_batch(config, size) for size in range(rows, 0, -1) if rows % size == 0]


def with_micro_batch(config: Config, size: int) -> Config:
    """``size`` rows a pass, and as many passes as make the same step."""
    train = dataclasses.replace(
        config.train, micro_batch_size=size, grad_accum=config.train.batch_size // size
    )
    return dataclasses.replace(config, train=train)


def largest_fitting(config: Config, conditions: Conditions, available: float) -> Config | None:
    """The arrangement with the largest micro-batch that ``available`` bytes hold; None: none."""
    fitting = (c for c in arrangements(config) if training_memory(c, conditions).peak <= available)
    return next(fitting, None)


def free_memory(device: str) -> int:
    """Bytes that can be had on ``device``."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return available_memory()
