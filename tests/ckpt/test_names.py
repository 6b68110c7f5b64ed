"""Prefixes of trainers and wrappers come off, a model's own names stay."""

from __future__ import annotations

import pytest
from veomni_ckpt.key_map import strip_prefixes


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["model.layers.0.w", "lm_head.weight"], ["model.layers.0.w", "lm_head.weight"]),
        (["model.layers.0.w", "model.norm.w"], ["model.layers.0.w", "model.norm.w"]),
        (["model.model.layers.0.w", "model.lm_head.weight"], ["model.layers.0.w", "lm_head.weight"]),
        (["module.model.w", "module.lm_head.w"], ["model.w", "lm_head.w"]),
        (["app.module._orig_mod.model.w", "app.module._orig_mod.h"], ["model.w", "h"]),
        (["_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.b"], ["a.b"]),
        (["layers._orig_mod.0.w", "x"], ["layers.0.w", "x"]),
        (["model.foundation.a", "model.encoders.b"], ["foundation.a", "encoders.b"]),
        (["module", "module.x"], ["module", "module.x"]),
        (["weight"], ["weight"]),
    ],
)
def test_prefixes_come_off_where_all_names_share_them(given_names: list[str], expected: list[str]) -> None:
    assert strip_prefixes(given_names) == expected
