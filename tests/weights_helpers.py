"""Tiny checkpoints as other programs write them."""

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


def write_gguf(path, tensors, metadata=()):
    """`tensors`: {name: (values, type)}; `metadata`: [(writer method, key, value)]."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for method, key, value in metadata:
        getattr(writer, method)(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "héllo", "world"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
