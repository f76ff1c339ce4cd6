"""Tiny, randomly initialised models of Transformers, one for each architecture that is tested."""

import torch
import transformers

V = 97

_LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_HEADS = {**_LLAMA, "head_dim": 8}
_EXPERTS = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.02)
_GPT2 = dict(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=40)
_ROTARY = {**_GPT2, "rotary_dim": 4}
_LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_TRANSLATION = dict(
    vocab_size=V,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
_MAMBA = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)

# class -> options of its configuration. What is unlike a Llama at the end of the model is named.
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _HEADS,
    "MixtralForCausalLM": {**_LLAMA, **_EXPERTS, "num_local_experts": 4},  # an auxiliary loss
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": {
        **_LLAMA,
        **_EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3ForCausalLM": {**_HEADS, "tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": {**_HEADS, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
    "GemmaForCausalLM": _HEADS,  # tied
    "Gemma2ForCausalLM": {**_HEADS, "final_logit_softcapping": 0.7},  # a softcap
    "Gemma3ForCausalLM": {**_HEADS, "final_logit_softcapping": 0.5},
    "PhiForCausalLM": {**_LLAMA, "partial_rotary_factor": 0.5},  # a bias in the head
    "Phi3ForCausalLM": _LLAMA,
    "GraniteForCausalLM": {**_LLAMA, "logits_scaling": 8.0},  # logits / 8
    "GraniteMoeForCausalLM": {
        **_LLAMA,
        **_EXPERTS,
        "num_local_experts": 4,
        "logits_scaling": 0.5,
    },
    "CohereForCausalLM": {**_LLAMA, "logit_scale": 0.0625},  # logits * 0.0625
    "Cohere2ForCausalLM": {**_HEADS, "logit_scale": 4.0},
    "OlmoForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _LLAMA,
    "OlmoeForCausalLM": {**_LLAMA, **_EXPERTS, "num_experts": 4},
    "StableLmForCausalLM": {**_LLAMA, "partial_rotary_factor": 0.5},
    "Starcoder2ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "GPTJForCausalLM": _ROTARY,  # a bias in the head
    "CodeGenForCausalLM": _ROTARY,
    "OPTForCausalLM": {**_LLAMA, "ffn_dim": 40, "word_embed_proj_dim": 16},  # a smaller embedding
    "BloomForCausalLM": dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "FalconForCausalLM": dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "MambaForCausalLM": _MAMBA,
    "FalconMambaForCausalLM": _MAMBA,
    "Mamba2ForCausalLM": {**_MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "DeepseekV2ForCausalLM": {**_LLAMA, **_LATENT},
    "DeepseekV3ForCausalLM": {**_LLAMA, **_LATENT},
    "GlmForCausalLM": _HEADS,
    "Glm4ForCausalLM": _HEADS,
    "NemotronForCausalLM": _HEADS,
    "SmolLM3ForCausalLM": _LLAMA,
    "Ernie4_5ForCausalLM": _HEADS,
    "HeliumForCausalLM": _HEADS,
    "PersimmonForCausalLM": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "BioGptForCausalLM": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "GptOssForCausalLM": {**_HEADS, **_EXPERTS, "num_local_experts": 4},
    "RecurrentGemmaForCausalLM": {**_LLAMA, "num_hidden_layers": 3, "lru_width": 32},  # a softcap
    "FalconH1ForCausalLM": {  # logits * 0.25, of another module's attribute
        **_HEADS,
        "lm_head_multiplier": 0.25,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "BertLMHeadModel": {**_LLAMA, "is_decoder": True},  # layers between the base model and the head
    "EsmForMaskedLM": {**_LLAMA, "mask_token_id": 3},  # a vector (V) is added to the logits
    "BartForConditionalGeneration": _TRANSLATION,  # a vector (1, V) is, from here on
    "MBartForConditionalGeneration": _TRANSLATION,
    "MarianMTModel": _TRANSLATION,
    "PegasusForConditionalGeneration": _TRANSLATION,
    "LEDForConditionalGeneration": {
        **_TRANSLATION,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    },
}
# What cutloss.patch refuses, and tests make too.
REFUSED = {
    "FSMTForConditionalGeneration": {
        **{k: v for k, v in _TRANSLATION.items() if k not in ("vocab_size", "pad_token_id")},
        "langs": ["en", "de"],
        "src_vocab_size": V,
        "tgt_vocab_size": V,
    },
}


def make(name, **changes):
    """In training mode, without dropout."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(**{**{**ARCHITECTURES, **REFUSED}[name], **changes})
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    model = kind(config)
    model.train()
    with torch.no_grad():
        for p in model.parameters():  # biases and what starts at zero too
            p.add_(0.05 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name == "final_logits_bias":
                b.add_(torch.randn_like(b))
    return model


def batch(V=V):
    torch.manual_seed(1)
    ids = torch.randint(3, V, (2, 10))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 7:] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
