"""Small random checkpoints of every family: real architecture, real files, self-made tokenizer.

`tiny_checkpoint("qwen2-vl")` writes one into a temporary folder, once a process, in about a second.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from vlm_local.primitives import list_phrases

MIXED = ("qwen3-vl-moe", "qwen3.5-moe")  # of experts: served as the families before the dash; so is "internvl-moe"
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", *MIXED)
PALIGEMMA = ("paligemma", "paligemma2")
SMOLVLM = ("smolvlm", "smolvlm2")
KEEP_NOTHING = PALIGEMMA  # of a prompt from one step to the next
KEEP_A_STATE = ("qwen3.5", "qwen3.5-moe", "lfm2-vl")  # which serves where all of the text before it is the same
FAMILIES = (*QWEN, *PALIGEMMA, "gemma3", "gemma4", "glm4v", "lfm2-vl", "internvl", "mistral3", "molmo2", *SMOLVLM)
# Molmo2 on Qwen3, and its kind on OLMo 3.
MOLMO2 = ("molmo2", "molmo2-o")
MISTRAL = ("mistral3", "mistral3-small")  # Ministral 3, and Mistral Small of the same family
# Gemma 4's larger models, of the same family: dense, and with a mixture of experts.
GEMMA4 = ("gemma4", "gemma4-31b", "gemma4-26b")

_WIDTH = 64
_INIT = 0.15  # wide enough that phrases differ in probability, narrow enough that none has it all
_QWEN_SPLIT = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_CAPITALS, _SMALLS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]*[{_SMALLS}]+|[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]+[{_SMALLS}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOL_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_INTERN_CHAT = _CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
# GLM-4.6V's: nothing stands behind an answer but the next question.
_GLM_CHAT = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}<think></think>\n{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' and not enable_thinking %}/nothink{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if not enable_thinking %}<think></think>\n{% endif %}{% endif %}"
)
_LFM2_CHAT = "{{ bos_token }}" + _CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
# All pictures first, numbered where they are several; the text's parts joined; an answer ended by the next question.
_MOLMO2_CHAT = (
    "{% set shown = namespace(count=0) %}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set shown.count = shown.count + 1 %}{% endif %}{% endfor %}{% endfor %}"
    "{% for number in range(shown.count) %}"
    "{{ 'Image ' ~ (number + 1) if shown.count > 1 else '' }}<|image|>{% endfor %}"
    "{% for message in messages %}{% if message['role'] == 'user' and not loop.first %}<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' ~ message['role'] }}\n"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') }}"
    "{% if message['role'] == 'user' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MOLMO2_MARKS = ("<im_start>", "<im_end>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>")
_MOLMO2_MARKS += ("<frame_start>", "<frame_end>", "<|video|>")
_MISTRAL_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}[SYSTEM_PROMPT]You were made by Mistral AI in Paris. "
    "Today is {{ strftime_now('%Y-%m-%d') }}.[/SYSTEM_PROMPT]{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'][0]['text'] }}{{ eos_token }}{% else %}[INST]"
    "{% if message['content'] | length == 2 %}{% set parts = message['content'] | sort(attribute='type') %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "[/INST]{% endif %}{% endfor %}"
)
_GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA4_CHAT = _GEMMA_CHAT.replace("<start_of_turn>", "<|turn>").replace("<end_of_turn>", "<turn|>")
_GEMMA4_CHAT = _GEMMA4_CHAT.replace("<start_of_image>", "<|image|>")
# Of the larger models: thoughts are off, and the template says so.
_GEMMA4_LARGE_CHAT = _GEMMA4_CHAT.replace(
    "model\n{% endif %}", "model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
_GLM_NAMES = ["[gMASK]", "<sop>", "<|assistant|>", "<|observation|>", "<think>", "</think>", "/nothink"]
_GLM_NAMES += ["<|begin_of_video|>", "<|end_of_video|>"]
_GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA4_NAMES |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_GEMMA4_NAMES |= {"sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>", "eoc_token": "<channel|>"}

# What the tokenizers learn from: a prompt as it might be, fixed, so that they stay the same.
_CORPUS = (
    (
        "You move a WidowX robot arm one small step at a time. The picture shows the arm, the table and the "
        "objects as a camera behind the robot's shoulder sees them.\n"
        "\n"
        "Directions are the robot's: forward is away from its base (up in the picture), backward is toward "
        "the base, left and right are as in the picture, up is away from the table, down is toward it. Tilt "
        "up and tilt down pitch the gripper. Clockwise and counterclockwise turn it as seen from above.\n"
        "\n"
        'Answer with one movement of up to four parts, joined by ", " and in this order: "move" with one to '
        'three of forward or backward, left or right, up or down; "tilt up" or "tilt down"; "rotate '
        'clockwise" or "rotate counterclockwise"; "close gripper" or "open gripper". Leave out what does not '
        'move. Answer "stop" when nothing should move. Examples: "move forward left", "move down, close '
        'gripper", "stop".\n'
        "\n"
        "Task: $instruction\n"
        "Last movements, oldest first: $history"
    ),
    ("Measured state: $proprio.\nWhich movement brings the robot closer to finishing the task now?"),
    "",
    (
        "answer en A robot arm should $instruction. State: $proprio. Last movements: $history. Forward is up "
        "in the picture. Which way must the gripper move now: forward or backward, left or right, up or down,"
        " tilt, rotate, open or close, or stop?"
    ),
)


@functools.cache
def tiny_checkpoint(family: str, seed: int = 0) -> Path:
    """Folder of a random checkpoint; the same folder for the same arguments, gone at exit."""
    return write_checkpoint(family, _scratch() / f"{family}-{seed}", seed)


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="vlm-local-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a random checkpoint of `family` (one of FAMILIES or GEMMA4) in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    build, family = _BUILDERS[family], family.removesuffix("-moe")
    tokenizer, special = _build_tokenizer(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in _list_processor_files(family).items():
        (folder / name).write_text(json.dumps(content, indent=1))
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    torch.manual_seed(seed)
    model = build(tokenizer.get_vocab_size(), ids)
    ends = [ids["document_end"], ids["eos"]] if "document_end" in ids else ids["eos"]
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=ids["pad"], bos_token_id=ids.get("bos")
    )
    model.save_pretrained(folder)
    return folder


# --- tokenizers -------------------------------------------------------------------------------


def _list_texts() -> list[str]:
    """Few phrases, so that their words fall into one to three tokens, as with the real vocabularies."""
    return [*_CORPUS, *list_phrases()[::120], "put the spoon on the towel, then open the drawer 0123456789"]


def _build_tokenizer(family: str) -> tuple[Tokenizer, dict[str, str]]:
    if family in PALIGEMMA:
        return _build_gemma_tokenizer()
    if family == "gemma3":
        return _build_gemma3_tokenizer()
    if family in GEMMA4:
        return _build_gemma4_tokenizer()
    if family in MISTRAL:
        return _build_mistral_tokenizer()
    if family in SMOLVLM:
        special = {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|endoftext|>", "image": "<image>"}
        extra = ["<fake_token_around_image>", "<global-img>"]
        split = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        special = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
        if family == "glm4v":
            special |= {"eos": "<|user|>", "document_end": "<|endoftext|>", "image": "<|image|>", "video": "<|video|>"}
            special |= {"start": "<|begin_of_image|>", "end": "<|end_of_image|>"}
        elif family == "lfm2-vl":
            special |= {"pad": "<|pad|>", "bos": "<|startoftext|>", "image": "<image>"}
            special |= {"start": "<|image_start|>", "end": "<|image_end|>"}
        elif family in MOLMO2:  # behind the rows that the head has
            special |= {"image": "<im_patch>"}
        elif family == "internvl":
            special |= {"image": "<IMG_CONTEXT>", "video": "<video>", "start": "<img>", "end": "</img>"}
        else:
            special |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
            special |= {"start": "<|vision_start|>", "end": "<|vision_end|>"}
        extra = _GLM_NAMES if family == "glm4v" else ["<|im_start|>", *(_MOLMO2_MARKS if family in MOLMO2 else ())]
        split = pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(BPE())
    if family not in SMOLVLM:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=335, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_list_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*special.values(), *extra)])
    if family == "lfm2-vl":
        tokenizer.post_processor = _begin_with(special["bos"], tokenizer)
    return tokenizer, special


def _begin_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """Every text begins with this token."""
    pair = (token, tokenizer.token_to_id(token))
    return processors.TemplateProcessing(f"{token} $A", f"{token} $A $B", [pair])


def _build_mistral_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    """Tekken's: its control tokens come first, every text begins with <s>."""
    special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "image": "[IMG]"}
    others = ["<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG_BREAK]", "[IMG_END]"]
    names = [*special.values(), *others]
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(_TEKKEN_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=350, initial_alphabet=alphabet, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(_list_texts(), trainer)
    tokenizer.post_processor = _begin_with("<s>", tokenizer)
    return tokenizer, special


def _build_gemma_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    """PaliGemma's, with its names of places."""
    tokenizer, special = _learn_gemma_tokenizer()
    tokenizer.add_tokens([f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer, special | {"image": "<image>"}


def _build_gemma3_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    """Gemma 3's: empty lines are tokens, every text begins with <bos>."""
    tokenizer, special = _learn_gemma_tokenizer()
    special |= {"begin": "<start_of_image>", "end": "<end_of_image>", "image": "<image_soft_token>"}
    special |= {"turn": "<start_of_turn>", "eos": "<end_of_turn>", "document_end": "<eos>"}
    names = [special[name] for name in ("begin", "end", "image", "turn", "eos")]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (1, 2, 3)])
    tokenizer.post_processor = _begin_with("<bos>", tokenizer)
    return tokenizer, special


def _build_gemma4_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    """Gemma 4's: it leaves <bos> to the chat template."""
    tokenizer, special = _learn_gemma_tokenizer()
    names = [*_GEMMA4_NAMES.values(), "<|video|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (1, 2, 3)])
    return tokenizer, special | {"image": "<|image|>", "eos": "<turn|>", "document_end": "<eos>", "video": "<|video|>"}


def _learn_gemma_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    """Gemma's type: spaces become metaspace, unknown characters fall back to bytes."""
    learner = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    words = pre_tokenizers.Split("▁", behavior="merged_with_next")
    marks = pre_tokenizers.Split(Regex(r"[^▁\p{L}\p{N}]"), behavior="isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, marks])
    special = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>"}
    reserved = [*special.values(), "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=420, special_tokens=reserved, show_progress=False)
    learner.train_from_iterator(_list_texts(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    return tokenizer, special


# --- the small files beside the weights -----------------------------------------------------------


_GEMMA_WORDS = {"tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
_QWEN_WORDS = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _list_processor_files(family: str) -> dict[str, dict]:
    if family in QWEN:
        return _list_qwen_files(family)
    if family in SMOLVLM:
        return _list_smolvlm_files(family)
    if family == "gemma3":
        return _list_gemma3_files()
    if family in GEMMA4:
        return _list_gemma4_files(_GEMMA4_CHAT if family == "gemma4" else _GEMMA4_LARGE_CHAT)
    if family == "glm4v":
        return _list_glm_files()
    if family == "lfm2-vl":
        return _list_lfm2_files()
    if family == "internvl":
        return _list_internvl_files()
    if family in MOLMO2:
        return _list_molmo2_files()
    if family in MISTRAL:
        return _list_mistral_files()
    image = {"image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor"}
    image |= {"size": {"height": 56, "width": 56}, "image_seq_length": 16, "resample": 3}
    return {"tokenizer_config.json": _GEMMA_WORDS, "preprocessor_config.json": image | _normalise(0.5, 0.5)}


def _normalise(mean: float, std: float) -> dict:
    return {"do_normalize": True, "do_rescale": True, "image_mean": [mean] * 3, "image_std": [std] * 3}


def _list_qwen_files(family: str) -> dict[str, dict]:
    processor = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL"}.get(family, "Qwen3VL") + "Processor"
    image = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": processor}
    image |= {"temporal_patch_size": 2, "merge_size": 2} | _normalise(0.45, 0.27)
    if family.startswith("qwen3"):
        image |= {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    else:
        image |= {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    return {
        "tokenizer_config.json": _QWEN_WORDS,
        "preprocessor_config.json": image,
        "chat_template.json": {"chat_template": _CHATML},
    }


def _list_gemma3_files() -> dict[str, dict]:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    image = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
    image |= {"size": {"height": 112, "width": 112}, "image_seq_length": 16, "resample": 2, "do_pan_and_scan": None}
    return {
        "tokenizer_config.json": _GEMMA_WORDS | {"extra_special_tokens": names} | names,
        "preprocessor_config.json": image | _normalise(0.5, 0.5),
        "processor_config.json": {"image_seq_length": 16, "processor_class": "Gemma3Processor"},
        "chat_template.json": {"chat_template": _GEMMA_CHAT},
    }


def _list_gemma4_files(template: str) -> dict[str, dict]:
    image = {"image_processor_type": "Gemma4ImageProcessor", "do_normalize": False, "do_rescale": True, "resample": 3}
    image |= {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70, "image_seq_length": 70}
    processor = {"processor_class": "Gemma4Processor", "image_processor": image, "image_seq_length": 70}
    processor["feature_extractor"] = {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "sampling_rate": 16000}
    return {
        "tokenizer_config.json": _GEMMA_WORDS | _GEMMA4_NAMES | {"extra_special_tokens": ["<|video|>"]},
        "processor_config.json": processor,
        "chat_template.json": {"chat_template": template},
    }


def _list_glm_files() -> dict[str, dict]:
    image = {"image_processor_type": "Glm46VImageProcessor", "processor_class": "Glm46VProcessor", "do_rescale": True}
    image |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    image |= {"size": {"shortest_edge": 12544, "longest_edge": 9633792}}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return {
        "tokenizer_config.json": words,
        "preprocessor_config.json": image | _normalise(0.45, 0.27),
        "chat_template.json": {"chat_template": _GLM_CHAT},
    }


def _list_lfm2_files() -> dict[str, dict]:
    """With the names of old and new folders: processor_config.json tells the first LFM2-VL how to cut pictures."""
    names = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    words |= {"bos_token": "<|startoftext|>", "extra_special_tokens": names} | names
    image = {"image_processor_type": "Lfm2VlImageProcessorFast", "processor_class": "Lfm2VlProcessor", "resample": 2}
    image |= {"do_resize": False, "encoder_patch_size": 8, "patch_size": 8, "max_num_patches": 160}
    image |= {"min_image_tokens": 4, "max_image_tokens": 40, "input_data_format": "channels_last"}
    cuts = {"do_image_splitting": True, "max_tiles": 10, "tile_size": 512, "use_thumbnail": True}
    image |= cuts | {"do_pad": True, "size": {"height": 512, "width": 512}, "return_row_col_info": True}
    return {
        "tokenizer_config.json": words,
        "preprocessor_config.json": image | _normalise(0.5, 0.5),
        "processor_config.json": {"processor_class": "Lfm2VlProcessor", "use_image_special_tokens": True} | cuts,
        "chat_template.json": {"chat_template": _LFM2_CHAT},
    }


def _list_internvl_files() -> dict[str, dict]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names |= {"video_token": "<video>"}
    image = {"image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor"}
    image |= {"size": {"height": 64, "width": 64}, "crop_to_patches": False, "min_patches": 1, "max_patches": 12}
    return {
        "tokenizer_config.json": _QWEN_WORDS | {"extra_special_tokens": names},
        "preprocessor_config.json": image | _normalise(0.45, 0.22),
        "processor_config.json": {"image_seq_length": 16, "processor_class": "InternVLProcessor"},
        "chat_template.json": {"chat_template": _INTERN_CHAT},
    }


def _list_molmo2_files() -> dict[str, dict]:
    image = {"image_processor_type": "Molmo2ImageProcessor", "processor_class": "Molmo2Processor", "resample": 2}
    image |= {"size": {"height": 70, "width": 70}, "patch_size": 14, "pooling_size": [2, 2], "max_crops": 8}
    image |= {"overlap_margins": [1, 1], "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
    processor = {"processor_class": "Molmo2Processor", "image_use_col_tokens": True}
    processor |= {"use_single_crop_col_tokens": False, "use_single_crop_start_token": True}
    return {
        "tokenizer_config.json": _QWEN_WORDS | {"bos_token": "<|im_end|>"},
        "preprocessor_config.json": image,
        "processor_config.json": processor | {"video_use_col_tokens": False, "use_frame_special_tokens": True},
        "chat_template.json": {"chat_template": _MOLMO2_CHAT},
    }


def _list_mistral_files() -> dict[str, dict]:
    """What a token is of a picture, the processor is told; of its own patches the image processor makes nothing."""
    words = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    image = {"image_processor_type": "PixtralImageProcessorFast", "patch_size": 14, "size": {"longest_edge": 1540}}
    processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    return {
        "tokenizer_config.json": words | {"unk_token": "<unk>"},
        "processor_config.json": processor | {"image_processor": image | {"resample": 3} | _normalise(0.45, 0.27)},
        "chat_template.json": {"chat_template": _MISTRAL_CHAT},
    }


def _list_smolvlm_files(family: str) -> dict[str, dict]:
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end_of_utterance>", "pad_token": "<|endoftext|>"}
    tokenizer |= {"bos_token": "<|im_start|>", "chat_template": _SMOL_CHAT}
    kind = {"smolvlm": "Idefics3", "smolvlm2": "SmolVLM"}[family]
    image = {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor"}
    image |= {"do_image_splitting": True, "do_pad": True, "do_resize": True, "do_convert_rgb": True}
    image |= {"max_image_size": {"longest_edge": 64}, "size": {"longest_edge": 256}, "resample": 1}
    return {
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": image | _normalise(0.5, 0.5),
        "processor_config.json": {"image_seq_len": 16, "processor_class": f"{kind}Processor"},
        "chat_template.json": {"chat_template": _SMOL_CHAT},
    }


# --- architectures ----------------------------------------------------------------------------------


_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": _WIDTH}


def _describe_text(vocab_size: int, ids: dict[str, int]) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": _INIT,
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }


def _describe_qwen(vocab_size: int, ids: dict[str, int], interleaved: bool = False) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    rope |= {"mrope_interleaved": True} if interleaved else {}
    return {
        "text_config": _describe_text(vocab_size, ids) | {"rope_parameters": rope, "bos_token_id": None},
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["start"],
        "vision_end_token_id": ids["end"],
        "tie_word_embeddings": True,
    }


def _build_qwen2(vocab_size: int, ids: dict[str, int]):
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": _WIDTH, "mlp_ratio": 2}
    vision |= {"initializer_range": _INIT}
    config = transformers.Qwen2VLConfig(vision_config=vision, **_describe_qwen(vocab_size, ids))
    return transformers.Qwen2VLForConditionalGeneration(config)


def _build_qwen25(vocab_size: int, ids: dict[str, int]):
    vision = _QWEN_VISION | {"fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, **_describe_qwen(vocab_size, ids))
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _describe_experts(**more: int) -> dict:
    """No square matrix among them: Qwen3-VL's are stored transposed, and found out by their shape."""
    return {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, **more}


def _build_qwen3(vocab_size: int, ids: dict[str, int], kind: str = "Qwen3VL"):
    vision = _QWEN_VISION | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    options = _describe_qwen(vocab_size, ids, interleaved=True)
    options["text_config"] |= {"head_dim": 16} | (_describe_experts() if kind.endswith("Moe") else {})
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, **options)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _build_qwen35(vocab_size: int, ids: dict[str, int], kind: str = "Qwen3_5"):
    vision = _QWEN_VISION | {"num_position_embeddings": 256, "initializer_range": _INIT}
    options = _describe_qwen(vocab_size, ids, interleaved=True)
    text = options["text_config"]
    text["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    text |= {"head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text |= {"num_hidden_layers": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= _describe_experts(shared_expert_intermediate_size=_WIDTH) if kind.endswith("Moe") else {}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, **options)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    for layer in model.model.language_model.layers[::2]:  # at random most heads forget all within some tokens
        layer.linear_attn.A_log.data = torch.tensor([0.001, 0.01, 0.1, 1.0]).log()
    return model


def _build_paligemma(vocab_size: int, ids: dict[str, int], text_type: str = "gemma"):
    text = _describe_text(vocab_size, ids) | {"model_type": text_type, "head_dim": 16, "bos_token_id": ids["bos"]}
    if text_type == "gemma2":  # a window shorter than the prompt, so that it matters
        text |= {"sliding_window": 16, "query_pre_attn_scalar": 16}
    vision = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    vision |= {"image_size": 56, "patch_size": 14}
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["image"],
        projection_dim=_WIDTH,
        hidden_size=_WIDTH,
        vocab_size=vocab_size,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _build_gemma3(vocab_size: int, ids: dict[str, int]):
    text = _describe_text(vocab_size, ids) | {"head_dim": 16, "bos_token_id": ids["bos"], "query_pre_attn_scalar": 16}
    # A window longer than a picture and shorter than the prompt, as in the real ones.
    text |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    vision = _VISION | {"image_size": 112, "patch_size": 14, "vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=16,
        image_token_index=ids["image"],
        boi_token_index=ids["begin"],
        eoi_token_index=ids["end"],
        eos_token_id=[ids["document_end"], ids["eos"]],
        initializer_range=_INIT,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=_INIT)  # else it is blind
    return model


def _build_gemma4(vocab_size: int, ids: dict[str, int], large: dict | None = None):
    """large: what the text part of a larger model has otherwise, None for the small ones."""
    kinds = ["sliding_attention", "full_attention"] * 2
    text = _describe_text(vocab_size, ids) | {"head_dim": 16, "global_head_dim": 32, "bos_token_id": ids["bos"]}
    text |= {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 24, "final_logit_softcapping": 30.0}
    if large is None:
        text |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8}
        text |= {"vocab_size_per_layer_input": vocab_size}
    else:
        text |= {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"} | large
    vision = _VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 256}
    vision |= {"use_clipped_linears": large is None, "standardize": large is not None, "initializer_range": _INIT}
    sound = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=sound | {"subsampling_conv_channels": [8, 4]} if large is None else None,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        initializer_range=_INIT,
    )
    model = transformers.Gemma4ForConditionalGeneration(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("layer_scalar", "per_expert_scale", "std_scale", "norm.weight")):
            tensor.data.uniform_(0.7, 1.3)
        elif name.endswith(("position_embedding_table", "std_bias")):
            tensor.data.normal_(std=_INIT)
        elif name.endswith(("put_min", "put_max")):  # a quarter of the numbers is beyond
            tensor.data.fill_(-1.0 if name.endswith("min") else 1.0)
    return model


def _build_glm(vocab_size: int, ids: dict[str, int]):
    """Half of each head has positions, and the vision tower's table of them is smaller than a picture."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    vision = _QWEN_VISION | {"image_size": 56, "intermediate_size": 96, "initializer_range": _INIT}
    config = transformers.Glm4vConfig(
        text_config=_describe_text(vocab_size, ids) | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        image_start_token_id=ids["start"],
        image_end_token_id=ids["end"],
    )
    return transformers.Glm4vForConditionalGeneration(config)


def _build_lfm2(vocab_size: int, ids: dict[str, int]):
    text = _describe_text(vocab_size, ids) | {"model_type": "lfm2", "bos_token_id": ids["bos"]}
    text |= {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    vision = _VISION | {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 25}
    config = transformers.Lfm2VlConfig(
        vision_config=vision | {"vision_use_head": False},
        text_config=text | {"block_multiple_of": 16},
        image_token_id=ids["image"],
        projector_hidden_size=_WIDTH,
        initializer_range=_INIT,
    )
    model = transformers.Lfm2VlForConditionalGeneration(config)
    for name, tensor in model.named_parameters():
        if name.endswith(("conv.conv.weight", "language_model.layers.1.self_attn.out_proj.weight")):
            tensor.data.normal_(std=0.5)  # else what came before hardly counts
    return model


def _build_internvl(vocab_size: int, ids: dict[str, int], text_type: str = "qwen2"):
    vision = _VISION | {"image_size": 64, "patch_size": 8, "initializer_range": _INIT}
    text = _describe_text(vocab_size, ids) | {"model_type": text_type, "bos_token_id": None}
    text |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}
    text |= _describe_experts(head_dim=16) if text_type.endswith("moe") else {}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=ids["image"], image_seq_length=16
    )
    return transformers.InternVLForConditionalGeneration(config)


def _build_molmo2(vocab_size: int, ids: dict[str, int], is_olmo: bool = False):
    """An odd number of patches a side, as in the real ones: some tokens pool one or two. Extra rows are the last."""
    rows = ids["image"]
    text = _describe_text(rows, ids) | {"head_dim": 16, "additional_vocab_size": vocab_size - rows}
    text |= {"max_position_embeddings": 1 << 15, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    if is_olmo:
        rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.2}
        text |= {"rope_parameters": rope | {"rope_theta": 10_000.0, "beta_fast": 32.0, "beta_slow": 1.0}}
        text |= {"qk_norm_type": "olmo", "norm_after": True, "rope_scaling_layers": [1], "num_key_value_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "image_size": [70, 70], "patch_size": 14}
    pool = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    pool |= {"intermediate_size": 64, "text_hidden_size": _WIDTH, "vision_feature_layer": [2, 0]}
    config = transformers.Molmo2Config(
        text_config=text,
        vision_config=vision | {"initializer_range": _INIT},
        adapter_config=pool | {"initializer_range": _INIT},
        image_patch_id=ids["image"],
        initializer_range=_INIT,
    )
    return transformers.Molmo2ForConditionalGeneration(config)


def _build_mistral(vocab_size: int, ids: dict[str, int], is_small: bool = False):
    """is_small: Mistral Small, else Ministral 3, whose queries grow with their position, here within a prompt."""
    text = _describe_text(vocab_size, ids) | {"head_dim": 16, "bos_token_id": ids["bos"], "sliding_window": None}
    if is_small:
        text |= {"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
    else:
        rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 32}
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
        text |= {"model_type": "ministral3", "rope_parameters": rope, "max_position_embeddings": 512}
    vision = _VISION | {"patch_size": 14, "image_size": 1540, "hidden_act": "silu", "initializer_range": _INIT}
    config = transformers.Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=ids["image"], tie_word_embeddings=not is_small
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("ln_pre.weight"):
            weight.data.uniform_(0.7, 1.3)
    return model


def _build_smolvlm(vocab_size: int, ids: dict[str, int], kind: str = "SmolVLM"):
    vision = _VISION | {"image_size": 64, "patch_size": 8}
    text = _describe_text(vocab_size, ids) | {"model_type": "llama", "bos_token_id": ids["bos"]}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=ids["image"], tie_word_embeddings=True
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


_DENSE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32} | _DENSE
_BUILDERS = {
    "qwen2-vl": _build_qwen2,
    "qwen2.5-vl": _build_qwen25,
    "qwen3-vl": _build_qwen3,
    "qwen3.5": _build_qwen35,
    "qwen3-vl-moe": functools.partial(_build_qwen3, kind="Qwen3VLMoe"),
    "qwen3.5-moe": functools.partial(_build_qwen35, kind="Qwen3_5Moe"),
    "paligemma": _build_paligemma,
    "paligemma2": functools.partial(_build_paligemma, text_type="gemma2"),
    "gemma3": _build_gemma3,
    "gemma4": _build_gemma4,
    "gemma4-31b": functools.partial(_build_gemma4, large=_DENSE),
    "gemma4-26b": functools.partial(_build_gemma4, large=_EXPERTS),
    "glm4v": _build_glm,
    "lfm2-vl": _build_lfm2,
    "internvl": _build_internvl,
    "internvl-moe": functools.partial(_build_internvl, text_type="qwen3_moe"),
    "molmo2": _build_molmo2,
    "molmo2-o": functools.partial(_build_molmo2, is_olmo=True),
    "mistral3": _build_mistral,
    "mistral3-small": functools.partial(_build_mistral, is_small=True),
    "smolvlm": functools.partial(_build_smolvlm, kind="Idefics3"),
    "smolvlm2": _build_smolvlm,
}
