"""Models with no parameter at its default: an exchanged or forgotten one shows.

Fresh weights give almost flat logits, and norms of ones and biases of zeros hide mistakes.
"""

import torch

from octavo.model.gpt import GPT


def random_model(config, seed=0, noise=0.3):
    """A model whose every parameter is away from where it began."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def perturb(module, only="", seed=7):
    """Any module, the same way; of it only the parameters with ``only`` in their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                std = 0.15 if parameter.dim() > 1 else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()
