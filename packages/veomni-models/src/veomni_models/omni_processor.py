"""The processor of an omni model: a tokenizer, an image processor, and how many tokens a picture becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipImageProcessor,
)

from veomni_models.errors import ModelError
from veomni_models.foundation import build_tokenizer
from veomni_models.omni_config import OmniConfig, encoder_config, is_omni_folder, tokens_per_picture


class OmniProcessor(ProcessorMixin):
    """Called with `text` and `images` like any transformers processor; each image token of the text is expanded.

    Args:
        image_processor: makes `pixel_values` [n, C, S, S].
        tokenizer: has `image_token` as one token.
        chat_template: Jinja source; None = the tokenizer's.
        image_token: stands for one picture in a text.
        tokens_per_image: how many tokens a picture becomes.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        tokens_per_image: int = 1,
    ) -> None:
        self.image_token = image_token
        self.tokens_per_image = tokens_per_image
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote."""
        # the tokenizer's loader looks up the model type of the folder
        AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)
        return super().from_pretrained(*args, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What stands in the text for picture `image_idx`."""
        return self.image_token * self.tokens_per_image


def build_omni_processor(
    tokenizer_path: str | Path | None,
    *,
    encoders: Mapping[Any, Mapping[str, Any]] = {},
    image_token: str = "<image>",
    chat_template: str | None = None,
) -> OmniProcessor:
    """The processor that fits `build_omni_model` with the same `encoders`.

    Args:
        tokenizer_path: a tokenizer's folder, or that of a saved `OmniProcessor`, which is then loaded as it is.
        encoders: as for `build_omni_model`; the image encoder's folder gives its image processor, without a folder
            pictures are resized to its `image_size` and scaled to -1 .. 1.
        image_token: added to the tokenizer if it is not in it.
        chat_template: Jinja source for a tokenizer that has none.

    Raises:
        ModelError: a folder is missing, or there is no image encoder.
    """
    if tokenizer_path is None:
        raise ModelError("no tokenizer was given: set model.tokenizer_path to the folder of one")
    if is_omni_folder(tokenizer_path):
        return OmniProcessor.from_pretrained(tokenizer_path)
    tokenizer: PreTrainedTokenizerBase = build_tokenizer(tokenizer_path)
    if tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:  # padding is masked, so that any token will do
        if tokenizer.eos_token is None:
            raise ModelError(f"{tokenizer_path}: the tokenizer has no pad_token and no eos_token: set one")
        tokenizer.pad_token = tokenizer.eos_token
    if "image" not in encoders:
        raise ModelError("model.encoders has no image: an omni processor needs an image encoder")
    encoder = encoder_config("image", encoders["image"])
    folder = encoders["image"].get("config_path") or encoders["image"].get("model_path")
    size = encoder["config"].image_size
    if folder is not None and (Path(folder) / "preprocessor_config.json").is_file():
        images = AutoImageProcessor.from_pretrained(folder)
    else:
        images = SiglipImageProcessor(size={"height": size, "width": size}, do_convert_rgb=True)
    tokens = tokens_per_picture(encoder["config"], encoder["merge_size"])
    return OmniProcessor(images, tokenizer, chat_template, image_token, tokens)
