"""The GPT: embeddings, a stack of blocks, a final norm, a head. Read from top to bottom.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octavo.errors import ConfigError
from octavo.linear import Linear
from octavo.model.attention import Attend, Attention, sdpa
from octavo.model.kv_cache import CacheView
from octavo.model.layers import MLP, make_norm, rope_table
from octavo.model_config import ModelConfig


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream.

    pre: ``x + f(norm(x))``; post: ``norm(x + f(x))``; sandwich: ``x + norm(f(norm(x)))``.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_position = config.norm_position
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        if config.norm_position == "sandwich":
            self.attn_out_norm = make_norm(config)
            self.mlp_out_norm = make_norm(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: CacheView | None = None,
        attend: Attend = sdpa,
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        match self.norm_position:
            case "pre":
                x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, cache, attend))
                x = x + self.drop(self.mlp(self.mlp_norm(x)))
            case "post":
                x = self.attn_norm(x + self.drop(self.attn(x, rope, mask, cache, attend)))
                x = self.mlp_norm(x + self.drop(self.mlp(x)))
            case "sandwich":
                y = self.attn(self.attn_norm(x), rope, mask, cache, attend)
                x = x + self.drop(self.attn_out_norm(y))
                x = x + self.drop(self.mlp_out_norm(self.mlp(self.mlp_norm(x))))
        return x


class GPT(nn.Module):
    """A decoder-only transformer: token ids in, logits out."""

    def __init__(self, config: ModelConfig) -> None:
        """Build and initialize; ``config.vocab_size`` must be known."""
        super().__init__()
        if not config.vocab_size:
            raise ConfigError(
                "model.vocab_size is 0", fix="give the tokenizer's, e.g. ModelConfig(vocab_size=65)"
            )
        self.config = config
        self.grad_checkpoint = False
        self.tok_emb = nn.Embedding(config.vocab_size, config.d_model)
        if config.uses_learned_positions:
            self.pos_emb = nn.Embedding(config.block_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        post = config.norm_position == "post"  # its blocks end with a norm already
        self.norm_f = nn.Identity() if post else make_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.tok_emb.weight
        if config.uses_rope:
            cos, sin = rope_table(config, torch.arange(config.block_size))
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """GPT-2's weights: N(0, 0.02) and zero biases (Radford et al. 2019).

        What writes to the residual stream is scaled by 1/sqrt(2 n_layer), so that the stream's
        variance does not grow with depth. The embedding and the head may be asked for otherwise.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                if module is not self.lm_head or not self.config.tie_embeddings:
                    nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.embed_std != 0.02:
            nn.init.normal_(self.tok_emb.weight, std=self.config.embed_std)
        if self.config.zero_head:
            nn.init.zeros_(self.lm_head.weight)

    def forward(
        self,
        idx: Tensor,
        cache: CacheView | None = None,
        mask: Tensor | None = None,
        attend: Attend = sdpa,
    ) -> Tensor:
        """Token ids (B, T) to logits (B, T, V)."""
        return self.lm_head(self.hidden(idx, cache, mask, attend))

    def hidden(
        self,
        idx: Tensor,
        cache: CacheView | None = None,
        mask: Tensor | None = None,
        attend: Attend = sdpa,
    ) -> Tensor:
        """Token ids (B, T) to the final normed states (B, T, D), before the head.

        ``cache`` holds earlier tokens and says where these stand; without it they start at 0.
        ``mask`` (B, 1, T, T), True where a query may look, replaces plain causality.
        """
        if cache is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        else:
            positions, mask = cache.positions, cache.mask()
        reach = idx.size(1) if cache is None else cache.end  # above every position
        x = self.tok_emb(idx)
        if self.config.uses_learned_positions:
            self._check_reach(reach)
            x = x + self.pos_emb(positions)
        x = self.drop(x)
        rope = self._rope(positions, reach) if self.config.uses_rope else None
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rope, mask, None, attend, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, attend)
        if cache is not None:
            cache.commit()
        return self.norm_f(x)

    def set_dropout(self, p: float) -> None:
        """Change every dropout rate, for annealing."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, Attention):
                module.dropout = p

    def _rope(self, positions: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions below ``reach``, (T, E/2) or, by row, (B, 1, T, E/2);
        beyond block_size computed anew.
        """
        if self.rope_cos.size(0) < reach:
            cos, sin = rope_table(self.config, positions)
        elif positions.dim() == 1:  # 0, 1, 2 ...: nothing to look up
            cos, sin = self.rope_cos[:reach], self.rope_sin[:reach]
        else:
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])

    def _check_reach(self, length: int) -> None:
        if length > self.config.block_size:
            raise ConfigError(
                f"{length} tokens do not fit the {self.config.block_size} learned positions",
                fix="shorten the text or train with a longer model.block_size",
            )
