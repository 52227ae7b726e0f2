"""Many ways to ask for a task, for training alone; the simulator's own words are in its tasks.

No word is used that only the simulator's unseen instructions have (`HELD_OUT`), so what the level
`words` measures stays unseen. A word that ends in "?" in the tables below says nothing that the rest of
its sentence does not say: it may become a random, made-up or unknown word, so that the model learns to read
over words that it does not know.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from vlm_local.sim.block_tasks import COLOURS, RELATIONS
from vlm_local.sim.tasks import TASKS, find_task
from vlm_local.training.tokenizer import WORDS

_STRANGE, _TYPO, _POLITE, _SHOUTED = 0.45, 0.12, 0.25, 0.1  # chance of each in a sentence
_MAX_FILLERS, _MAX_LETTERS = 3, 9  # of a sentence, of a made-up word

#: What a word that training never had looks like to the model: one token, whose embedding is never trained as an
#: input. The embeddings of all such tokens are alike, since as outputs they are only ever made unlikely.
UNKNOWN = "Which"


def _find_words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


_NAMES = _find_words(" ".join((*COLOURS, *RELATIONS, "left right")))
_SEEN = _NAMES | {word for task in TASKS.values() for text in task.words for word in _find_words(text)}
# Words of no training sentence. The last two are for what tells the arm not to move (lab: spatial).
HELD_OUT = {word for task in TASKS.values() for text in task.unseen for word in _find_words(text)} - _SEEN
HELD_OUT |= {"stay", "where"}

# Names in braces are tables again, or names of the question such as {colour}.
_PARTS = {
    "the": ("the", "the", "the", "the", "this", "a"),
    "thing": ("block?", "block?", "brick?", "thing?", "object?", "piece?", "toy?", "one?", "square?", "box?"),
    "reaching": (
        *("reach?", "reach? for?", "move? to?", "go? to?", "touch?", "head? for?", "come? to?", "tap?", "visit?"),
        *("move? the gripper? to?", "bring? the gripper? to?", "guide? the hand? to?", "lower? the gripper? onto?"),
        *("go? over? to?", "aim? for?", "steer? to?", "travel? to?", "meet?"),
    ),
    "lifting": (
        *("lift", "pick up", "raise", "lift up", "grasp and lift", "hoist", "elevate", "grab and raise", "scoop up"),
        *("bring up", "hold up", "pick", "heave"),
    ),
    "taking": ("lift?", "raise?", "pick?", "carry?", "fetch?", "remove?", "clear?", "grab?"),
    "away": ("from?", "from?", "away? from?", "up? from?", "out? of?"),
    "ground": ("counter?", "desk?", "ground?", "wood?", "board?", "floor?", "surface?"),
    "pushing": ("push?", "move?", "slide?", "shift?", "nudge?", "drag?", "press?", "sweep?", "drive?", "send?"),
    "aside": (
        *("to the {side}", "{side}", "towards the {side}", "over to the {side}", "to the {side} side"),
        *("in the {side} direction", "a bit {side}", "more to the {side}"),
    ),
    "neighbour": ("block?", "one?", "thing?", "object?", "neighbour?", "brick?"),
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "behind": ("behind", "behind", "in back of", "beyond"),
    "in front of": ("in front of", "in front of", "to the front of"),
    "moving": ("put?", "move?", "place?", "bring?", "carry?", "lay?", "transfer?", "set?", "deliver?", "send?"),
    "eggplant": ("the? eggplant", "the? eggplant", "the? eggplant", "the? aubergine", "the? purple vegetable?"),
    "into": ("in?", "to?", "into?", "inside?", "down? into?"),
    "basket": (
        *("the yellow basket", "the basket", "the yellow bin?", "the yellow container?", "the yellow tray?"),
        *("the yellow crate?", "the yellow grid?", "the yellow thing?"),
    ),
    "sink": (
        *("the blue sink", "the sink", "the blue bowl?", "the blue tub?", "the blue tray?"),
        *("the blue bath?", "the blue hole?", "the blue thing?"),
    ),
    "drawer": ("the drawer", "the drawer", "the drawer of the cabinet", "the cabinet drawer"),
}
# Sentences that begin with what to do: after "do not" they ask for nothing.
_ORDERS = {
    "reach": (
        *("{reaching} {the} {colour} {thing}", "{reaching} {the} {thing} coloured? {colour}"),
        "{reaching} the {thing} in? {colour}",
    ),
    "lift": (
        *("{lifting} {the} {colour} {thing}", "lift {the} {colour} {thing} up", "{taking} {the} {colour} {thing} up"),
        *("{lifting} the {thing} coloured? {colour}", "{taking} {the} {colour} {thing} {away} the {ground}"),
        "{lifting} {the} {colour} {thing} {away} the {ground}",
        "raise {the} {colour} {thing} into the air",
    ),
    "push": (
        *("{pushing} {the} {colour} {thing} {aside}", "{pushing} {aside} {the} {colour} {thing}"),
        *("make? {the} {colour} {thing} go? {aside}", "{pushing} the {thing} coloured? {colour} {aside}"),
    ),
    "reach_relation": (
        *(
            "{reaching} the {neighbour} {relation} {the} {colour} {thing}",
            "{reaching} whatever? sits? {relation} {the} {colour} {thing}",
            "look? for? {the} {colour} {thing} and? {reaching} the {neighbour} {relation} this?",
        ),
    ),
    "open_drawer": (
        *("open {drawer}", "open up {drawer}", "pull? open {drawer}", "pull {drawer} out", "draw? {drawer} open"),
        *("pull out {drawer}", "make? {drawer} open", "slide? {drawer} out", "move? {drawer} out"),
    ),
    "close_drawer": (
        *("close {drawer}", "close up {drawer}", "shut {drawer}", "push {drawer} shut", "slide? {drawer} closed"),
        *("push {drawer} in", "make? {drawer} close", "press? in {drawer}", "move? {drawer} in"),
    ),
    "eggplant_in_basket": ("{moving} {eggplant} {into} {basket}", "{moving} {into} {basket} {eggplant}"),
    "eggplant_in_sink": ("{moving} {eggplant} {into} {sink}", "{moving} {into} {sink} {eggplant}"),
    "reach_shown": (
        *(
            "{reaching} the marked {thing}",
            "{reaching} the {thing} marked before?",
            "{reaching} the {thing} shown first",
        ),
        "{reaching} the {thing} marked in? the beginning?",
    ),
    "put_back": (
        *("{moving} {the} {colour} {thing} back", "{pushing} back {the} {colour} {thing}"),
        "{pushing} {the} {colour} {thing} back to? its? old place?",
    ),
}
_STATEMENTS = {
    "reach_shown": (
        "the marked {thing}: {reaching} this?",
        "to the marked {thing}",
        "the {thing} shown first: {reaching} this?",
    ),
    "put_back": ("the {colour} {thing} goes? back", "back with {the} {colour} {thing}", "{the} {colour} {thing}: back"),
    "reach": (
        *("the {colour} {thing}: {reaching} this?", "to {the} {colour} {thing}", "the {colour} {thing} now"),
        "{the} {thing} coloured? {colour}, {reaching} this?",
    ),
    "lift": (
        *("the {colour} {thing} goes? up", "up, {the} {colour} {thing}", "the {colour} {thing} has? to? come? up"),
        "the {colour} {thing}: up, into the air",
    ),
    "push": (
        *("{aside}, {pushing} {the} {colour} {thing}", "the {colour} {thing} has? to? go? {aside}"),
        *(
            "the {colour} {thing} goes? {aside}",
            "the {colour} {thing} must? come? more? {side}",
            "I want? {the} {colour} {thing} {aside}",
            "the {colour} {thing}: {aside}",
        ),
    ),
    "reach_relation": (
        *(
            "{relation} {the} {colour} {thing}: {reaching} the {neighbour}",
            "the {neighbour} {relation} {the} {colour} {thing}",
            "see? {the} {colour} {thing}, then? {reaching} the {neighbour} {relation} this?",
        ),
    ),
    "open_drawer": ("I want? {drawer} open", "{drawer} has? to? open", "{drawer}: open", "{drawer} goes? out"),
    "close_drawer": ("I want? {drawer} closed", "{drawer} has? to? close", "{drawer}: shut", "{drawer} goes? in"),
    "eggplant_in_basket": (
        *("{eggplant} goes? {into} {basket}", "{into} {basket} goes? {eggplant}", "{eggplant}: {into} {basket}"),
        *(
            "{eggplant} has? to? go? {into} {basket}",
            "I want? {eggplant} {into} {basket}",
            "{eggplant} fits? in {basket}",
        ),
    ),
    "eggplant_in_sink": (
        *("{eggplant} goes? {into} {sink}", "{into} {sink} goes? {eggplant}", "{eggplant}: {into} {sink}"),
        *("{eggplant} has? to? go? {into} {sink}", "I want? {eggplant} {into} {sink}", "{eggplant} fits? in {sink}"),
    ),
}
_BEFORE = ("could you", "would you", "can you", "kindly", "I want you to", "robot,", "hey robot,", "ok,", "now", "next")
_AFTER = (", thanks", ", thank you", "for me", "now", "if you can", "slowly", "in one go", "!", ".", "?")
_NOT = ("do not", "don't", "never", "you must not", "you may not", "no need to", "do not ever", "by no means")
_NOTHING = (
    *("do nothing", "hold still", "wait", "stop", "stop now", "do not move", "don't move", "no task", "halt"),
    *("leave {the} {colour} {thing} alone", "leave everything as before", "nothing to do", "keep still", "not now"),
)
_ABSENT = ("carrot", "banana", "apple", "corn", "mushroom", "spoon", "fork", "towel", "bottle", "knife", "strawberry")
_ABSENT_COLOURS = ("pink", "silver", "golden", "turquoise", "cyan")

# Words that mean nothing here.
_FILLERS = (
    *("now", "then", "just", "so", "again", "next", "slowly", "carefully", "gently", "quickly", "straight", "robot"),
    *("its", "this", "small", "little", "big", "round", "wooden", "metal", "large", "hand", "base", "corner"),
    *("first", "second", "third", "near", "from", "by", "for", "or", "and", "a", "an", "all", "to", "on", "over"),
    *("bowl", "cup", "plate", "pot", "ball", "white", "black"),
)
# What may stand for a word that says nothing: no name, no verb, nothing that would change the meaning.
_MEANINGFUL = set(_ABSENT) | set(_ABSENT_COLOURS) | _find_words(
    "none not stop eggplant open close closed shut lift pick raise grab grasp top up out down in into sink drawer "
    "basket cabinet handle gripper back marked shown push pull move slide away forward backward toward towards"
)  # fmt: skip
_STRANGERS = tuple(sorted({word for word in WORDS.lower().split() if word.isalpha()} - HELD_OUT - _NAMES - _MEANINGFUL))


def word_task(task: str, names: Mapping[str, str], rng: np.random.Generator) -> str:
    """An instruction for a task of the simulator. names: what the task is about, as in `Task.names`."""
    choices = (*_ORDERS[task], *_STATEMENTS[task]) if rng.random() < 0.6 else find_task(task).words
    return _finish(_choose(choices, rng), names, rng)


def word_negation(task: str, names: Mapping[str, str], rng: np.random.Generator) -> str:
    """An instruction not to do a task, or to do nothing; right is "stop"."""
    if rng.random() < 0.25:
        return _finish(_choose(_NOTHING, rng), {"colour": "red", **names}, rng)
    order = _choose(_ORDERS[task] if rng.random() < 0.5 else find_task(task).words, rng)
    return _finish(f"{_choose(_NOT, rng)} {order}", names, rng)


def word_absent(task: str, names: Mapping[str, str], present: set[str], rng: np.random.Generator) -> str:
    """An instruction about a thing or a colour that is not in the picture; right is "stop".

    present: colours of the blocks in the picture.
    """
    if "colour" in names and rng.random() < 0.8:
        missing = [colour for colour in COLOURS if colour not in present]
        colour = _choose(missing if rng.random() < 0.8 else _ABSENT_COLOURS, rng)
        return word_task(task, {**names, "colour": colour}, rng)
    thing = _choose(_ABSENT, rng)
    if "colour" in names:
        order = _choose(("{reaching} the ?", "{lifting} the ?", "{pushing} the ? {aside}"), rng).replace("?", thing)
    elif "eggplant" in task:
        order = f"{{moving}} the {thing} {{into}} {_choose(('{sink}', '{basket}'), rng)}"
    else:
        order = f"{_choose(('open', 'close', 'shut', 'reach', 'lift'), rng)} the {thing}"
    return _finish(order, {"side": _choose(("left", "right"), rng)}, rng)


def _choose(choices, rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]


def _finish(text: str, names: Mapping[str, str], rng: np.random.Generator) -> str:
    """Fill the places of a sentence and make it polite, misspelt, longer or stranger, by chance."""
    text = _expand(text, names, rng)
    strange = 0.6 if rng.random() < _STRANGE else 0.05  # many words of some sentences, one now and then of the others
    words = [_replace(word, strange, rng) for word in text.split(" ")]
    if rng.random() < _POLITE:
        words = [_choose(_BEFORE, rng), *words] if rng.random() < 0.5 else [*words, _choose(_AFTER, rng)]
    if rng.random() < 0.4:
        for _ in range(rng.integers(1, _MAX_FILLERS + 1)):
            words.insert(rng.integers(len(words) + 1), _choose(_FILLERS, rng))
    if rng.random() < _TYPO:
        index = rng.integers(len(words))
        words[index] = _misspell(words[index], rng)
    text = re.sub(r" ([,.!?])", r"\1", " ".join(words))
    if rng.random() < _SHOUTED:
        text = text[:1].upper() + text[1:]
    return text


def _expand(text: str, names: Mapping[str, str], rng: np.random.Generator) -> str:
    def fill(match: re.Match) -> str:
        name = match[1]
        if name == "relation":
            return _choose(_PARTS[names[name]], rng)
        return names.get(name) or _choose(_PARTS[name], rng)

    while "{" in text:
        text = re.sub(r"{(\w+)}", fill, text)
    return text


def _replace(word: str, share: float, rng: np.random.Generator) -> str:
    plain = word.replace("?", "")
    if plain == word or rng.random() >= share:
        return plain
    if (kind := rng.random()) < 0.4:
        return UNKNOWN
    return _choose(_STRANGERS, rng) if kind < 0.65 else _make_up(rng)


def _make_up(rng: np.random.Generator) -> str:
    """A word that nobody knows, spelt like words: each letter follows the one before it as in some word of WORDS."""
    while True:
        word = _choose(_FOLLOWING[""], rng)
        while len(word) < _MAX_LETTERS and (letter := _choose(_FOLLOWING[word[-1]], rng)):
            word += letter
        if len(word) > 2 and word not in HELD_OUT | _SEEN | _MEANINGFUL:
            return word


def _list_following() -> dict[str, list[str]]:
    """Letter -> those that follow it, as often as they do; "" stands for the start and the end of a word."""
    following = defaultdict(list)
    words = (word for word in WORDS.split() if word.isalpha() and word.islower())
    for letter, after in (pair for word in words for pair in pairwise(["", *word, ""])):
        following[letter].append(after)
    return following


_FOLLOWING = _list_following()


def _misspell(word: str, rng: np.random.Generator) -> str:
    """A letter twice, left out, or two exchanged; short words stay as they are."""
    if len(word) < 4 or not word.isalpha():
        return word
    place = int(rng.integers(1, len(word) - 1))
    head, letter, tail = word[:place], word[place], word[place + 1 :]
    wrong = _choose((head + letter * 2 + tail, head + tail, head + tail[:1] + letter + tail[1:]), rng)
    return word if wrong in HELD_OUT | _SEEN | _MEANINGFUL else wrong
