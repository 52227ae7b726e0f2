"""A folder's processor: its image processor and tokenizer, which are a stranger's."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from vlm_local.checkpoint import TOKENIZER_FILES
from vlm_local.engines.molmo2 import Molmo2ImageProcessorPil
from vlm_local.engines.naflex import NaflexImageProcessorPil
from vlm_local.engines.processing import apply_template, is_chat
from vlm_local.engines.templates import check_template, pick_template
from vlm_local.errors import ConfigError
from vlm_local.weights import read_json

_OTHERS = ("video_processor", "feature_extractor")  # parts of a processor, for videos and sounds
_SEQUENCE = ("image_seq_length", "image_seq_len")  # names of the number of tokens that a picture takes

# Of each family: its processor, its image processor, and what the latter cannot do without in the folder's file,
# because the class would take another model's value for it.
_PROCESSORS = {
    "qwen2-vl": ("Qwen2VLProcessor", "Qwen2VLImageProcessorPil", ()),
    "qwen2.5-vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessorPil", ()),
    "qwen3-vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessorPil", ("patch_size", "image_mean", "image_std")),
    "qwen3.5": ("Qwen3VLProcessor", "Qwen2VLImageProcessorPil", ("patch_size", "image_mean", "image_std")),
    "paligemma": ("PaliGemmaProcessor", "SiglipImageProcessorPil", ("size",)),
    "paligemma2": ("PaliGemmaProcessor", "SiglipImageProcessorPil", ("size",)),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessorPil", ("size",)),
    "gemma4": ("Gemma4Processor", "Gemma4ImageProcessorPil", ("max_soft_tokens",)),
    "glm4v": ("Glm4vProcessor", "Glm4vImageProcessorPil", ()),
    "lfm2-vl": ("Lfm2VlProcessor", NaflexImageProcessorPil, ()),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessorPil", ("size", "image_mean", "image_std")),
    "mistral3": ("PixtralProcessor", "PixtralImageProcessorPil", ("size",)),
    "molmo2": (
        *("Molmo2Processor", Molmo2ImageProcessorPil),
        ("size", "patch_size", "pooling_size", "image_mean", "image_std"),
    ),
    "smolvlm": ("Idefics3Processor", "Idefics3ImageProcessorPil", ("max_image_size",)),
    "smolvlm2": ("SmolVLMProcessor", "SmolVLMImageProcessorPil", ("max_image_size",)),
}


def load_processor(folder: Path, family: str, adapter: Path | None = None) -> Any:
    """The family's own processor, of images and text only, whatever class names the folder's files hold.

    adapter: its tokenizer and image processor count before the model's, where it has some: it was trained with them.
    transformers cannot build a video processor without torchvision, so the stock classes of Qwen
    and SmolVLM fail to load there; nobody shows a video here, so they are loaded without one.
    """
    name, images, needed = _PROCESSORS[family]
    words = adapter if adapter and any((adapter / file).is_file() for file in TOKENIZER_FILES) else folder
    pictures = adapter if adapter and _describes_pictures(adapter) else folder
    images = getattr(transformers, images) if isinstance(images, str) else images
    stock = _import_pixtral() if family == "mistral3" else getattr(transformers, name)
    kind = _bind_parts(stock, images, needed, words, pictures)
    whole = words if words == pictures else folder
    try:
        processor = kind.from_pretrained(whole, local_files_only=True)
        _avoid_splitting(processor, family)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{folder} has no usable tokenizer and image processor: {error!r}") from error
    if is_chat(family):
        if words != whole:  # a tokenizer alone has its template with it
            processor.chat_template = processor.tokenizer.chat_template or processor.chat_template
        processor.chat_template = pick_template(processor, whole)
        render = partial(apply_template, processor)
        check_template(processor.chat_template, render, words)
    return processor


def _import_pixtral() -> type:
    """transformers' processor of Mistral 3. Its module wants torchvision for one function, which Pillow's has, too."""
    place = "transformers.models.pixtral"
    try:
        return importlib.import_module(f"{place}.processing_pixtral").PixtralProcessor
    except ModuleNotFoundError:
        pillows = importlib.import_module(f"{place}.image_processing_pil_pixtral")
        sys.modules[f"{place}.image_processing_pixtral"] = pillows
        return importlib.import_module(f"{place}.processing_pixtral").PixtralProcessor


def _describes_pictures(folder: Path) -> bool:
    """Whether the folder has an image processor: a processor_config.json may stand there without one."""
    file = folder / "processor_config.json"
    return (folder / "preprocessor_config.json").is_file() or (file.is_file() and "image_processor" in read_json(file))


def _avoid_splitting(processor: Any, family: str) -> None:
    """Show a picture once. SmolVLM blows one of 256x256 up to 2048x2048 and 17 tiles, which show nothing more and take
    six times as long to prepare; InternVL cuts one of 640x480 into 13 of 448x448.
    """
    images = processor.image_processor
    if family.startswith("smolvlm"):
        images.do_image_splitting, images.size = False, {"longest_edge": images.max_image_size["longest_edge"]}
    elif family == "internvl":
        processor.images_kwargs = {"crop_to_patches": False}
    elif family == "gemma3":
        processor.images_kwargs = {**processor.images_kwargs, "do_pan_and_scan": False}


class _WithoutOthers(transformers.ProcessorMixin):
    """Stands behind a stock class, some of which name the parts that they hand on; others are None among the rest."""

    def __init__(self, *args, **kwargs):
        args = [part for part in args if part is not None]
        super().__init__(*args, **{name: part for name, part in kwargs.items() if name not in _OTHERS})


def _bind_parts(stock: type, image_processor: type, needed: Sequence[str], words: Path, pictures: Path) -> type:
    """The processor class with the parts that it is made of fixed, and none for videos and sounds.

    words, pictures: folders of the tokenizer and of the image processor.

    Pillow's image processor also where torchvision is present: the same pixels on every machine.
    """
    named = inspect.signature(stock.__init__).parameters
    others = {name: None for name in _OTHERS if name in named}
    settings = [name for name in named if name not in others]

    class Bound(stock, _WithoutOthers):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            parts = {"image_processor": image_processor, "tokenizer": tokenizer, **others}
            told = {name: value for name, value in kwargs.items() if value is not None}
            super().__init__(**parts, chat_template=chat_template, **told)

        @staticmethod
        def validate_init_kwargs(processor_config, valid_kwargs):
            """Takes of a folder's file what the stock class names, not what is named above."""
            return stock.validate_init_kwargs(processor_config, settings)

        @classmethod
        def _get_arguments_from_pretrained(cls, folder, processor_dict=None, **options):
            stored, _ = image_processor.get_image_processor_dict(pictures, local_files_only=True)
            missing = [key for key in needed if stored.get(key) is None]
            if missing:
                raise ConfigError(
                    f"{pictures}: preprocessor_config.json (or image_processor in processor_config.json) lacks "
                    f"{missing[0]}, which cannot be guessed"
                )
            # Many of Mistral's files split some words wrongly, which the flag mends; with it transformers keeps to
            # tokenizer.json where Mistral's own library is installed. For other families it does nothing.
            tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True, fix_mistral_regex=True)
            return [image_processor.from_dict(stored), tokenizer]

    return Bound


def check_pictures(processor: Any, config: Any, folder: Path) -> None:
    """Raises ConfigError where the processor cuts pictures otherwise than the model's vision tower reads them, or gives
    them another number of places in the prompt.
    """
    images, vision = processor.image_processor, config.vision_config
    keys = ("patch_size", "merge_size", "temporal_patch_size", "pooling_kernel_size", "spatial_merge_size")
    keys += ("encoder_patch_size", "downsample_factor")
    cuts = {key: getattr(processor, key, getattr(images, key, None)) for key in keys}  # Mistral's processor has its own
    cuts["size"] = dict(images.size or {}).get("height")  # None for families that take pictures of any size
    names = {"merge_size": "spatial_merge_size", "size": "image_size", "encoder_patch_size": "patch_size"}
    for key, cut in cuts.items():
        name = names.get(key, key)
        read = getattr(vision, name, getattr(config, name, None))
        if cut is not None and read is not None and cut != np.ravel(read)[0]:
            raise ConfigError(
                f"{folder}: {key} is {cut} for the processor (preprocessor_config.json or processor_config.json), but "
                f"config.json has {name} {read}; make them the same"
            )
    name = next((each for each in _SEQUENCE if hasattr(processor, each)), None)
    if name is None or hasattr(images, "max_soft_tokens"):  # Qwen's and Gemma 4's take what their size asks for
        return
    read = _count_features(config)
    if (written := getattr(processor, name)) != read:
        raise ConfigError(
            f"{folder}: {name} is {written} (processor_config.json or preprocessor_config.json), but the model makes "
            f"{read} tokens of a picture; write {read}"
        )


def _count_features(config: Any) -> int:
    """Tokens of a picture, in a family that makes the same number of each."""
    if count := getattr(config, "mm_tokens_per_image", None):
        return count
    vision = config.vision_config
    size, patch = (np.ravel(each)[0] for each in (vision.image_size, vision.patch_size))  # InternVL's are pairs
    ratio = getattr(config, "downsample_ratio", None) or 1 / getattr(config, "scale_factor", 1)
    return round((size // patch * ratio) ** 2)


def check_tokens(processor: Any, config: Any, folder: Path) -> None:
    """Raises ConfigError where words can have tokens that the model has no row for, or a picture has another one.

    Special tokens do not come from words; Gemma's tokenizer adds a <mask> that no PaliGemma needs a row for.
    """
    tokenizer, num_rows = processor.tokenizer, config.get_text_config().vocab_size
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max(set(tokenizer.get_vocab().values()) - special)
    if last >= num_rows:
        raise ConfigError(
            f"{folder}: the tokenizer's last word is {last}, {tokenizer.convert_ids_to_tokens(last)!r}, but the model "
            f"has {num_rows} (vocab_size in config.json); take the tokenizer that belongs to the model"
        )
    picture = processor.image_token_ids[0]
    if picture != config.image_token_id:
        name = tokenizer.convert_ids_to_tokens(picture)
        raise ConfigError(
            f"{folder}: a picture's token is {picture}, {name!r}, for the tokenizer, "
            f"but config.json has image_token_id {config.image_token_id}; take the tokenizer that belongs to the model"
        )
