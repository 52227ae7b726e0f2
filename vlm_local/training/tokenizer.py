"""The tiny model's own tokenizer: byte-level BPE in which a word or a measured number is one token."""

import json
from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from vlm_local.primitives import list_phrases

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO)

# The measured state is written as letter and number, such as "x253 y-12 z104": millimetres,
# degrees and percent. Each is one token within these (inclusive) ranges, and several outside.
NUMBERS = {"x": (0, 499), "y": (-349, 349), "z": (0, 399), "p": (-99, 99), "w": (-180, 180), "g": (0, 100)}
_PIECES = r" ?[a-z]-?\d+| ?\p{L}+|\d| ?[^\s\p{L}\d]+|\s+"

WORDS = """
a an the all and or at by for from in into of off on onto out over near next not measured none
above behind below beside between closed close-by front inside left-hand right-hand top bottom middle centre center
corner edge side table tray counter sink drawer cabinet handle basket bowl cup plate pot pan lid mug box bin rack
block cube ball cylinder object thing toy can bottle spoon fork knife towel cloth eggplant carrot banana apple orange
mushroom corn pepper strawberry cheese sushi gripper robot arm hand base
red green blue yellow purple pink orange white black grey gray brown silver dark light cyan
reach touch go get move put place pick lift raise push pull slide open close shut turn grab grasp take bring drop
flip fold stack sweep wipe stop please should to toward towards away your its it one that this is named
small large big little round wooden metal left right up down forward backward first second third
Reach Touch Go Move Put Place Pick Lift Push Pull Slide Open Close Turn Grab Take Bring Drop What Which
test connection task state history xnot ynot znot pnot wnot gnot
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learn merges from the phrases and WORDS until every word is one token; add NUMBERS."""
    corpus = [*list_phrases(), *WORDS.split(), *(f" {word}" for word in WORDS.split())]
    learner = _byte_level(BPE())
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=20_000,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    vocabulary, merges = dict(learned["vocab"]), [tuple(pair) for pair in learned["merges"]]
    for text in _list_numbers():
        prefixes = [text[: end + 1] for end in range(len(text))]
        for left, right in pairwise(prefixes):
            if right not in vocabulary:
                vocabulary[right] = len(vocabulary)
                merges.append((left, right[-1]))
    tokenizer = _byte_level(BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, VISION_START, VISION_END, IMAGE, VIDEO],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _byte_level(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _list_numbers() -> list[str]:
    """Spelled in the byte-level alphabet. The prompt begins with x, so only the others follow a space."""
    spelled = []
    for letter, (low, high) in NUMBERS.items():
        head = letter if letter == "x" else f"Ġ{letter}"
        spelled += [f"{head}{value}" for value in range(low, high + 1)]
    return spelled
