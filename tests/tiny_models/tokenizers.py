"""Tokenizers of the families' own kinds, which learn from a few hundred words."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.tiny_models.names import GEMMA4, MISTRAL, MOLMO2, PALIGEMMA, SMOLVLM
from vlm_local.primitives import list_phrases

_QWEN_SPLIT = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_CAPITALS, _SMALLS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]*[{_SMALLS}]+|[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]+[{_SMALLS}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MOLMO2_MARKS = ("<im_start>", "<im_end>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>")
_MOLMO2_MARKS += ("<frame_start>", "<frame_end>", "<|video|>")
_GLM_NAMES = ["[gMASK]", "<sop>", "<|assistant|>", "<|observation|>", "<think>", "</think>", "/nothink"]
_GLM_NAMES += ["<|begin_of_video|>", "<|end_of_video|>"]
GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
GEMMA4_NAMES |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
GEMMA4_NAMES |= {"sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>", "eoc_token": "<channel|>"}

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


def _list_texts() -> list[str]:
    """Few phrases, so that their words fall into one to three tokens, as with the real vocabularies."""
    return [*_CORPUS, *list_phrases()[::120], "put the spoon on the towel, then open the drawer 0123456789"]


def build_tokenizer(family: str) -> tuple[Tokenizer, dict[str, str]]:
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
    names = [*GEMMA4_NAMES.values(), "<|video|>"]
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
