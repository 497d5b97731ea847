"""Language models: plain decoders, tied tables, fused projections, encoders, encoder-decoders, state spaces."""

import pytest
import torch
import transformers as T
from finetune import roundtrip

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
ENCODER = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
IDS = torch.tensor([[3, 7, 1, 9, 22, 5], [8, 2, 30, 4, 6, 39]])
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}


def llama():
    return T.LlamaForCausalLM(T.LlamaConfig(**SMALL, tie_word_embeddings=False)), {"input_ids": IDS}


def qwen2_tied():
    return T.Qwen2ForCausalLM(T.Qwen2Config(**SMALL, tie_word_embeddings=True)), {"input_ids": IDS}


def qwen3_tied():
    return T.Qwen3ForCausalLM(T.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)), {"input_ids": IDS}


def gemma3():
    settings = T.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16)
    return T.Gemma3ForCausalLM(settings), {"input_ids": IDS}


def phi3():
    return T.Phi3ForCausalLM(T.Phi3Config(**SMALL, **NO_TOKENS)), {"input_ids": IDS}


def neox():
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**ENCODER, **NO_TOKENS)), {"input_ids": IDS}


def gpt2():
    settings = T.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32, **NO_TOKENS)
    return T.GPT2LMHeadModel(settings), {"input_ids": IDS}


def falcon():
    """Its linear layers are a class of their own with a forward of their own, which does the same."""
    settings = T.FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, **NO_TOKENS)
    return T.FalconForCausalLM(settings), {"input_ids": IDS}


def opt():
    settings = T.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return T.OPTForCausalLM(settings), {"input_ids": IDS}


def t5():
    settings = T.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=40)
    return T.T5ForConditionalGeneration(settings), BOTH


def bart():
    settings = T.BartConfig(
        d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=40, max_position_embeddings=32,
    )  # fmt: skip
    return T.BartForConditionalGeneration(settings), BOTH


def bert():
    return T.BertForMaskedLM(T.BertConfig(**ENCODER)), {"input_ids": IDS}


def bert_head():
    return T.BertForSequenceClassification(T.BertConfig(**ENCODER, num_labels=3)), {"input_ids": IDS}


def deberta():
    settings = T.DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8, num_labels=3
    )
    return T.DebertaV2ForSequenceClassification(settings), {"input_ids": IDS}


def nomic():
    """Its queries, keys and values are one tensor on disk and three parameters in memory."""
    return T.NomicBertModel(T.NomicBertConfig(**ENCODER)), {"input_ids": IDS}


def jamba():
    settings = T.JambaConfig(
        **SMALL, mamba_d_state=4, mamba_dt_rank=4, num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    return T.JambaForCausalLM(settings), {"input_ids": IDS}


def mamba():
    settings = T.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4)
    return T.MambaForCausalLM(settings), {"input_ids": IDS}


def mamba2():
    settings = T.Mamba2Config(
        hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4, num_heads=4, head_dim=8, n_groups=1
    )
    return T.Mamba2ForCausalLM(settings), {"input_ids": IDS}


# Matrices that go in full, and why PEFT has no LoRA for them.
FULL = {
    opt: {"embed_positions": "forward of its own"},
    bart: {"embed_positions": "forward of its own"},
    deberta: {"rel_embeddings": "reads rel_embeddings.weight"},
    jamba: {"dt_proj": "reads", "conv1d": "groups", "A_log": "kind", "router": "kind"},
    mamba: {"dt_proj": "reads", "x_proj": "reads", "out_proj": "reads", "conv1d": "groups", "A_log": "kind"},
    mamba2: {"conv1d": "groups", "out_proj": "reads"},
}
MODELS = [
    llama, qwen2_tied, qwen3_tied, gemma3, phi3, neox, gpt2, falcon, opt, t5, bart, bert, bert_head, deberta, nomic,
    jamba, mamba, mamba2,
]  # fmt: skip


@pytest.mark.parametrize("everything", [False, True], ids=["matrices", "everything"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_full_rank_gives_the_finetune_back(build, everything, tmp_path):
    model, inputs = build()
    made = roundtrip(model, inputs, tmp_path, everything=everything)
    assert not made.plan.refused
    expected = FULL.get(build, {})
    found = made.plan.reasons
    assert {part for part in expected if any(part in name for name in found)} == set(expected)
    for name, why in found.items():
        assert any(part in name and reason in why for part, reason in expected.items()), (name, why)


@pytest.mark.parametrize("build", [qwen2_tied, t5], ids=lambda build: build.__name__)
def test_a_tied_table_in_full_survives_peft_merging(build, tmp_path):
    """As factors it would be merged once per end; ``roundtrip`` merges wherever no tie bears factors."""
    model, inputs = build()
    made = roundtrip(model, inputs, tmp_path, everything=True, tables=False)
    tied = set(made.layout.ties.values())
    assert tied
    assert tied <= set(made.plan.saved) - set(made.plan.base)
