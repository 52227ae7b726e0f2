"""The models that have a name here: which repository of the hub each is, and how large. No file is read."""

from dataclasses import dataclass

from vlm_local.weights import estimate_memory

DEFAULT = "tiny"


@dataclass(frozen=True)
class Model:
    """A model of the registry.

    repository: on the Hugging Face hub; None for the one that ships with the project.
    linear, rest: weights in linear layers and elsewhere, counted on the architecture.
    unread: weights for sounds, which are in the repository's files alone.
    stored_bytes: bytes a weight in the repository's files.
    gated: the licence must be accepted on the hub first.
    is_mixture: of experts, which --quantize does not pack; `linear` has those of a token.
    """

    name: str
    repository: str | None
    family: str
    linear: int = 0
    rest: int = 0
    stored_bytes: int = 2
    gated: bool = False
    alias: str | None = None
    unread: int = 0
    is_mixture: bool = False

    @property
    def quantizations(self) -> tuple[str, ...]:
        """What --quantize takes."""
        return ("none",) if self.is_mixture else ("none", "8bit", "4bit")

    @property
    def download_bytes(self) -> int:
        return self.stored_bytes * (self.linear + self.rest + self.unread)

    def estimate_memory(self, quantize: str) -> int:
        """Bytes of its weights with bfloat16 floats."""
        return estimate_memory(self.linear, self.rest, quantize)


MODELS = (
    Model("tiny", None, "qwen2-vl"),
    Model("qwen2-vl", "Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl", 1_973_420_032, 235_565_568, alias="qwen2-vl-2b"),
    Model("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl", 7_198_998_528, 1_092_377_088),
    Model("qwen2.5-vl", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl", 3_441_197_056, 313_425_920, alias="qwen2.5-vl-3b"),
    Model("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl", 7_199_817_728, 1_092_348_928),
    Model("qwen3-vl", "Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl", 1_811_939_328, 315_592_704, alias="qwen3-vl-2b"),
    Model("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", "qwen3-vl", 4_044_357_632, 393_458_176),
    Model("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl", 7_517_270_016, 1_249_853_680),
    Model(
        *("qwen3-vl-30b-a3b", "Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3-vl", 3_251_662_848, 27_819_091_184),
        is_mixture=True,
    ),
    Model("qwen3.5", "Qwen/Qwen3.5-4B", "qwen3.5", 3_898_343_424, 640_922_112, alias="qwen3.5-4b"),
    Model("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", "qwen3.5", 595_132_416, 257_853_504),
    Model("qwen3.5-2b", "Qwen/Qwen3.5-2B", "qwen3.5", 1_699_872_768, 513_368_896),
    Model("qwen3.5-9b", "Qwen/Qwen3.5-9B", "qwen3.5", 7_369_682_944, 2_040_130_800),
    Model("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", "qwen3.5", 2_857_480_192, 32_249_701_744, is_mixture=True),
    Model("cosmos-reason1-7b", "nvidia/Cosmos-Reason1-7B", "qwen2.5-vl", 7_199_817_728, 1_092_348_928),
    # Its file holds the head, which is the table of tokens, a second time.
    Model("cosmos-reason2-2b", "nvidia/Cosmos-Reason2-2B", "qwen3-vl", 1_811_939_328, 626_757_632, gated=True),
    Model("cosmos-reason2-8b", "nvidia/Cosmos-Reason2-8B", "qwen3-vl", 7_517_270_016, 1_249_853_680, gated=True),
    Model("paligemma", "google/paligemma-3b-mix-224", "paligemma", 2_395_238_400, 528_228_080, 4, True),
    Model("paligemma2", "google/paligemma2-3b-mix-224", "paligemma2", 2_438_000_640, 594_241_776, 2, True),
    Model("gemma3", "google/gemma-3-4b-it", "gemma3", 3_622_662_144, 677_417_328, gated=True, alias="gemma3-4b"),
    Model("gemma3-12b", "google/gemma-3-12b-it", "gemma3", 11_173_883_904, 1_013_441_136, gated=True),
    Model(
        *("gemma4", "google/gemma-4-E2B-it", "gemma4", 2_027_814_912, 2_769_298_688),
        alias="gemma4-e2b",
        unread=307_183_904,
    ),
    Model("gemma4-e4b", "google/gemma-4-E4B-it", "gemma4", 4_123_787_264, 3_508_556_800, unread=308_756_768),
    Model("gemma4-31b", "google/gemma-4-31B-it", "gemma4", 29_831_669_760, 1_441_416_752),
    Model(
        *("glm4.6v-flash", "zai-org/GLM-4.6V-Flash", "glm4v", 9_022_472_192, 1_270_305_280),
        alias="glm-4.6v-flash",
    ),
    Model("lfm2.5-vl", "LiquidAI/LFM2.5-VL-1.6B", "lfm2-vl", 1_460_695_040, 135_930_864, alias="lfm2.5-vl-1.6b"),
    Model("lfm2.5-vl-450m", "LiquidAI/LFM2.5-VL-450M", "lfm2-vl", 380_633_088, 68_085_760),
    Model("lfm2-vl-450m", "LiquidAI/LFM2-VL-450M", "lfm2-vl", 382_730_240, 68_092_416),
    Model("internvl3", "OpenGVLab/InternVL3-2B-hf", "internvl", 1_620_836_352, 468_121_088, alias="internvl3-2b"),
    Model("internvl3-1b", "OpenGVLab/InternVL3-1B-hf", "internvl", 664_289_280, 273_903_744),
    Model("internvl3-8b", "OpenGVLab/InternVL3-8B-hf", "internvl", 6_854_803_456, 1_089_570_304),
    # Its file holds the head, which is the table of tokens, a second time.
    Model(
        *("ministral3", "mistralai/Ministral-3-3B-Instruct-2512-BF16", "mistral3", 3_445_620_736, 806_122_496),
        alias="ministral3-3b",
    ),
    Model("ministral3-8b", "mistralai/Ministral-3-8B-Instruct-2512-BF16", "mistral3", 7_843_348_480, 1_074_677_760),
    Model("ministral3-14b", "mistralai/Ministral-3-14B-Instruct-2512-BF16", "mistral3", 12_601_786_368, 1_343_245_312),
    Model(
        *("mistral-small3.1", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3"),
        *(22_668_115_968, 1_343_245_312),
    ),
    Model("molmo2", "allenai/Molmo2-4B", "molmo2", 4_071_220_736, 779_648_464, 4, alias="molmo2-4b"),
    Model("molmo2-8b", "allenai/Molmo2-8B", "molmo2", 7_414_998_528, 1_246_704_592, 4),
    Model("molmo2-o-7b", "allenai/Molmo2-O-7B", "molmo2", 6_937_044_480, 823_742_416, 4),
    Model(
        *("smolvlm2", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm2", 2_042_916_864, 203_868_016, 4),
        alias="smolvlm2-2.2b",
    ),
    Model("smolvlm2-500m", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm2", 411_303_936, 96_178_368, 4),
    Model("smolvlm2-256m", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "smolvlm2", 198_180_864, 58_304_064, 4),
)


def find_model(name: str) -> Model | None:
    """Registry entry by name, alias or repository id."""
    return next((model for model in MODELS if name in (model.name, model.alias, model.repository)), None)
