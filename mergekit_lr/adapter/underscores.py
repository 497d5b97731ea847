"""Module paths from names in which every dot became an underscore.

``down_blocks_0_attentions_1_proj_in`` may be read in many ways. With the base at hand its own module names
decide. Without it the words that image models are built of do: a path is read as the longest known words, and
a name with any other word is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_lr.errors import FormatError

_WORDS = """
    down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 attn
    to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
    time_embedding add_embedding linear_1 linear_2 norm norm1 norm2 norm3
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op time_embed label_emb out
    text_model text_projection embeddings token_embedding position_embedding encoder layers self_attn q_proj k_proj
    v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2 final_layer_norm
    transformer resblocks in_proj c_fc c_proj ln_1 ln_2
    block layer SelfAttention DenseReluDense q k v o wi_0 wi_1 wo
    double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod qkv lin linear linear1 linear2
    modulation img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation
    single_transformer_blocks add_q_proj add_k_proj add_v_proj to_add_out ff_context norm1_context norm_out proj_mlp
    context_embedder x_embedder pos_embed y_embedder t_embedder time_text_embed timestep_embedder text_embedder
    guidance_embedder joint_blocks context_block x_block attention feed_forward w1 w2 w3 blocks cross_attn k_img v_img
    ffn
"""
WORDS = frozenset(_WORDS.split())
_LONGEST = max(word.count("_") + 1 for word in WORDS)


def table(modules: Iterable[str]) -> dict[str, str]:
    """Underscored name to path, for the modules of a base.

    Raises:
        FormatError: two modules of this base have the same underscored name.
    """
    paths: dict[str, str] = {}
    for module in modules:
        other = paths.setdefault(module.replace(".", "_"), module)
        if other != module:
            raise FormatError(f"modules {other} and {module} have the same name once dots are underscores")
    return paths


def read(name: str) -> str:
    """The path that an underscored ``name`` stands for, by the known words.

    Raises:
        FormatError: a word that image models do not have.
    """
    pieces, path = name.split("_"), []
    while pieces:
        for count in range(min(_LONGEST, len(pieces)), 0, -1):
            word = "_".join(pieces[:count])
            if word in WORDS or word.isdigit():
                path.append(word)
                del pieces[:count]
                break
        else:
            raise FormatError(
                f"module {name} cannot be read without its base: {pieces[0]!r} is no known word, so its dots are lost; "
                "give the base model"
            )
    return ".".join(path)
