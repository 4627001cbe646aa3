"""Tiny checkpoints as other programs write them."""

import json

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"}


def make(kind):
    """A tiny random model of transformers."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    model = {
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
        "clip_both": lambda: t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=TEXT)),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
        "dinov2_registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINO)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
        "llama_head_dim": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, head_dim=16)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, tie_word_embeddings=True)),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT), image_token_index=63
            )
        ),
        "llava_next": lambda: t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(
                vision_config=t.CLIPVisionConfig(**VISION),
                text_config=t.LlamaConfig(**TEXT),
                image_token_index=63,
                image_grid_pinpoints=[[28, 56], [56, 28], [84, 28]],
            )
        ),
        "llava_siglip": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.SiglipVisionConfig(**VISION),
                text_config=t.Qwen2Config(**TEXT),
                image_token_index=63,
                vision_feature_select_strategy="full",
            )
        ),
    }[kind]()
    for parameter in model.parameters():  # transformers starts biases at 0 and norms at 1: nothing may hide behind that
        torch.nn.init.normal_(parameter)
    return model


def saver(tmp_path_factory):
    """saved(kind) -> (folder, its tensors by their names on disk); each kind is made once."""
    from safetensors.numpy import load_file

    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            make(kind).save_pretrained(folder)
            made[kind] = folder, load_file(folder / "model.safetensors")
        return made[kind]

    return get


def write_gguf(path, tensors, metadata=(), architecture="llama"):
    """`tensors`: {name: (values, type)}; `metadata`: [(writer method, key, value)]."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for method, key, value in metadata:
        getattr(writer, method)(key, value)
    count = len(tensors["token_embd.weight"][0]) if "token_embd.weight" in tensors else 3
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "héllo", *(f"w{i}" for i in range(2, count))])
    writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (count - 1))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_folder(path, image=True, size=60):
    """A word-level tokenizer of `size` words, with or without `<image>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<image>" if image else "other", *(f"w{i}" for i in range(size - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"] + ["<image>"] * image)
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
