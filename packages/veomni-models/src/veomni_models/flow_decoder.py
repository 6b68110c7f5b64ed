"""A flow-matching decoder: a small diffusion transformer that draws pictures by a language model's hidden states."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from veomni_models.errors import ModelError

_TIME_SCALE, _LONGEST_PERIOD = 1000.0, 10_000.0  # of the sinusoids of a time from 0 to 1
_LEAST_REST = 0.05  # of the path: velocities are errors of a picture by the rest of it, which goes to 0


class FlowDecoderConfig(PreTrainedConfig):
    """Config of a `FlowDecoder`.

    Attributes:
        image_size: height and width of the pictures in pixels.
        patch_size: pixels of a patch's side.
        num_channels: 3, or 1 for grey pictures, which are made of the mean of the colours.
        hidden_size, num_hidden_layers, num_attention_heads: of the transformer; its MLPs are 4 x `hidden_size` wide.
        num_tokens: how many tokens of the language model a picture takes, by whose states it is drawn.
        condition_size: channels of these states.
        noise_samples: how many noisy versions of each picture a step learns from; the language model runs once for all.
        time_mean: m of the times that are learnt from, which are sigmoids of m + a normal variable: below 0 most have
            more noise than picture, which is where it is decided what the picture shows.
        loss_weight: of the flow's loss against the loss of a text token, for each of a picture's tokens.
    """

    model_type = "flow_decoder"
    image_size: int = 32
    patch_size: int = 2
    num_channels: int = 3
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_tokens: int = 16
    condition_size: int = 256
    noise_samples: int = 4
    time_mean: float = -0.8
    loss_weight: float = 1.0

    def check(self) -> None:
        """ModelError for sizes that do not divide each other."""
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ModelError(f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}")
        if self.num_channels not in (1, 3):
            raise ModelError(f"num_channels={self.num_channels} must be 3, or 1 for grey pictures")


class FlowBlock(nn.Module):
    """Attention over the condition and all patches, and an MLP, both scaled and shifted by the time (adaLN-zero).

    Formula: https://arxiv.org/abs/2212.09748, section 3.2.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(size, elementwise_affine=False)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size, elementwise_affine=False)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)
        self.modulation = nn.Linear(size, 6 * size)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [n, L, C]; time: [n, C] -> [n, L, C]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        n, length, size = x.shape
        qkv = self.qkv(self.attention_norm(x) * (1 + scale) + shift)
        q, k, v = qkv.view(n, length, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, size))
        return x + mlp_gate * self.down(F.gelu(self.up(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)))


class FlowDecoder(PreTrainedModel):
    """The picture in noise, given the language model's states at the picture's tokens.

    The path is x_t = (1 - t) noise + t picture (rectified flow, https://arxiv.org/abs/2209.03003). The transformer says
    what picture is at its end, and the loss is that of the velocity there, (picture - x_t) / (1 - t): a small one does
    so from large patches, whose noise it could not say (https://arxiv.org/abs/2511.13720). What stands at a picture's
    tokens on the way in are `queries`.
    """

    config_class = FlowDecoderConfig
    main_input_name = "noisy"
    base_model_prefix = "flow"
    _no_split_modules = ("FlowBlock",)

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__(config)
        config.check()
        size, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.queries = nn.Parameter(torch.empty(config.num_tokens, config.condition_size))
        self.positions = nn.Parameter(torch.empty(config.num_tokens + patches, size))
        self.condition_norm = nn.LayerNorm(config.condition_size)
        self.condition = nn.Linear(config.condition_size, size)
        self.patch = nn.Linear(config.num_channels * config.patch_size**2, size)
        self.time = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.blocks = nn.ModuleList(
            FlowBlock(size, config.num_attention_heads) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.modulation = nn.Linear(size, 2 * size)
        self.picture = nn.Linear(size, config.num_channels * config.patch_size**2)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, FlowBlock):
            nn.init.zeros_(module.modulation.weight)
        elif isinstance(module, FlowDecoder):
            nn.init.normal_(module.queries, std=0.02)
            nn.init.normal_(module.positions, std=0.02)
            for linear in (module.modulation, module.picture):
                nn.init.zeros_(linear.weight)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The picture at the end of the path, from a point of it.

        Args:
            noisy: [n, C, S, S], pictures in -1 .. 1 with noise of variance 1.
            time: [n], 0 is noise and 1 the picture.
            condition: [n, num_tokens, condition_size], states of the language model.

        Returns:
            [n, C, S, S].
        """
        config = self.config
        n, channels, p = len(noisy), config.num_channels, config.patch_size
        side = config.image_size // p
        patches = noisy.view(n, channels, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, -1)
        states = self.condition(self.condition_norm(condition))
        steps = torch.arange(config.hidden_size // 2, device=time.device) / (config.hidden_size // 2)
        angles = time[:, None].float() * _TIME_SCALE * torch.exp(-math.log(_LONGEST_PERIOD) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(states.dtype)
        moment = self.time(F.pad(waves, (0, config.hidden_size % 2))) + states.mean(1)
        x = torch.cat([states, self.patch(patches.to(states.dtype))], dim=1) + self.positions
        for block in self.blocks:
            x = block(x, moment)
        shift, scale = self.modulation(F.silu(moment))[:, None].chunk(2, dim=-1)
        out = self.picture(self.norm(x[:, config.num_tokens :]) * (1 + scale) + shift)
        return out.view(n, side, side, channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)

    def loss(self, condition: Tensor, pixel_values: Tensor, seed: int | None = None) -> Tensor:
        """How far the velocities are off, for each picture: the mean square over its pixels and noises.

        Args:
            condition: [n, num_tokens, condition_size].
            pixel_values: [n, 3, S, S] in -1 .. 1.
            seed: with it, the noise of a picture depends on this number and the picture alone, and not on the others
                beside it; None draws it from torch's generator.

        Returns:
            [n], float32.
        """
        samples = self.config.noise_samples
        pictures = self._own_channels(pixel_values.float())
        noise, time = self._noise(pictures, seed)  # [n, samples, C, S, S], [n, samples]
        at = time[..., None, None, None]
        noisy = (1 - at) * noise + at * pictures[:, None]
        found = self(noisy.flatten(0, 1), time.flatten(), condition.repeat_interleave(samples, dim=0))
        error = (found.view_as(noise).float() - pictures[:, None]) / (1 - at).clamp(min=_LEAST_REST)
        return error.square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        unconditional: Tensor | None = None,
        *,
        guidance_scale: float = 1.0,
        num_steps: int = 25,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw pictures, from noise along the velocity by Heun's method; the last step ends at the picture found then.

        Args:
            condition: [n, num_tokens, condition_size].
            unconditional: the same for no wish at all, [1, num_tokens, condition_size]; None: no guidance.
            guidance_scale: s in velocity = unconditional + s (conditional - unconditional)
                (classifier-free guidance, https://arxiv.org/abs/2207.12598).
            num_steps: from noise to picture, of two velocities each but for the last.
            generator: of the noise, on the CPU.

        Returns:
            [n, 3, S, S] in -1 .. 1.
        """
        n, size = len(condition), self.config.image_size
        x = torch.randn(n, self.config.num_channels, size, size, generator=generator).to(condition.device)
        guided = False
        if guidance_scale != 1.0 and unconditional is not None:
            condition, guided = torch.cat([condition, unconditional.expand(n, -1, -1)]), True

        def velocity(x: Tensor, time: float) -> Tensor:
            given = torch.cat([x, x]) if guided else x
            picture = self(given, given.new_full((len(given),), time), condition).float()
            out = (picture - given) / (1 - time)
            if not guided:
                return out
            with_wish, without = out.chunk(2)
            return without + guidance_scale * (with_wish - without)

        times = torch.linspace(0, 1, num_steps + 1).tolist()
        for start, end in pairwise(times):
            slope = velocity(x, start)
            if end < 1:
                slope = (slope + velocity(x + (end - start) * slope, end)) / 2
            x = x + (end - start) * slope
        return x.clamp(-1, 1).expand(-1, 3, -1, -1)

    def _own_channels(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.mean(1, keepdim=True) if self.config.num_channels == 1 else pixel_values

    def _noise(self, pictures: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """Noise [n, samples, C, S, S], and times [n, samples] (https://arxiv.org/abs/2403.03206, section 3.1)."""
        samples, mean = self.config.noise_samples, self.config.time_mean
        if seed is None:
            noise = torch.randn(len(pictures), samples, *pictures.shape[1:], device=pictures.device)
            return noise, (mean + torch.randn(len(pictures), samples, device=pictures.device)).sigmoid()
        noise, time = torch.empty(len(pictures), samples, *pictures.shape[1:]), torch.empty(len(pictures), samples)
        for i, picture in enumerate(pictures.cpu().contiguous()):
            generator = torch.Generator().manual_seed(zlib.crc32(picture.numpy().tobytes(), seed & 0xFFFFFFFF))
            noise[i].normal_(generator=generator)
            time[i].normal_(generator=generator)
        return noise.to(pictures.device), (mean + time).sigmoid().to(pictures.device)
