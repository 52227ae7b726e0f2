"""The small files beside the weights: chat templates, what processors are told."""

from tests.tiny_models.names import GEMMA4, MISTRAL, MOLMO2, QWEN, SMOLVLM
from tests.tiny_models.tokenizers import GEMMA4_NAMES

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


_GEMMA_WORDS = {"tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
_QWEN_WORDS = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def list_processor_files(family: str) -> dict[str, dict]:
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
        "tokenizer_config.json": _GEMMA_WORDS | GEMMA4_NAMES | {"extra_special_tokens": ["<|video|>"]},
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
