"""What a linear is to its block: from its name, corrected by the shapes of its neighbours.

A new model family gets its names here. A second attention in one block (cross-attention, TNT's
inner transformer, MaxViT's grid) and an attention that pools counts as a block of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..methods.base import FFN_ROLES, MHSA_ROLES, Site

_ATTENTION = (
    r"(?:self_)?(?:attn|attention)|attn_out|factoratt_crpe2?|token_mixer|xca|e_mhsa"
    r"|(?P<second>(?:encoder|cross|multihead)_attn|(?:cross_|temporal_)attention|attn_in"
    r"|factoratt_crpe[34])"
)
_FFN = r"mlp2?|(?P<second_ffn>mlp_in)"
_PROJECTIONS: tuple[tuple[str, str], ...] = (
    ("qkv|in_proj", "qkv"),
    ("kv", "kv"),
    ("qk", "qk"),
    ("q|wq|q_proj|(?:projection_)?query", "q"),
    ("k|wk|k_proj|(?:projection_)?key", "k"),
    ("v|wv|v_proj|(?:projection_)?value", "v"),
    (r"proj|projection|o_proj|out_proj|output\.dense", "o"),
)
_IN_FFN: tuple[tuple[str, str], ...] = (
    ("fc1_g|gate_proj", "gate"),
    (r"fc1(?:_x)?|up_proj|lin1|c_fc|dense1|w\d+|0", "fc1"),
    ("weights_in", "gate_fc1"),
    ("fc2|weights_out|down_proj|lin2|c_proj|dense2|3", "fc2"),
)
_OF_BLOCK: tuple[tuple[str, str], ...] = (
    (r"intermediate\.dense|linear1", "fc1"),
    (r"output\.dense|linear2", "fc2"),
)


def _either(tails: Iterable[tuple[str, str]], prefix: str) -> str:
    return "|".join(f"(?P<{prefix}_{role}>{tail})" for tail, role in tails)


_NAME = re.compile(
    r"^(?:(?P<block>.*\d(?:\.attn_block|\.attn_grid)?|(?:.*\.)?head)\."
    rf"(?:(?:{_ATTENTION})\.(?:(?:attention|self)\.)?(?:{_either(_PROJECTIONS, 'mhsa')})"
    rf"|(?:{_FFN})\.(?:{_either(_IN_FFN, 'ffn')})"
    rf"|{_either(_OF_BLOCK, 'block')})"
    r"|(?P<pool>(?:.*\.)?attn_pool)\."
    rf"(?:{_either(_PROJECTIONS, 'pool')}|mlp\.(?:{_either(_IN_FFN, 'poolffn')})))$"
)
_NUMBERED = re.compile(r"^(.*\.\d+)\.")
_OF_ATTENTION = re.compile(r"(?:^|\.)\w*(?:attn|attention|mhsa|xca|factoratt|token_mixer)\w*\.")
_OF_FFN = re.compile(r"(?:^|\.)\w*(?:mlp|ffn|feed_forward)\w*\.|\.(?:pwconv|fc|linear)[12]$")
# Inside an attention or an FFN, but neither a projection of tokens nor a matrix of the papers'.
_AUXILIARY = re.compile(
    r"(?:^|\.)(?:\w+_mlp|rel_pos\w*|pos_proj|proj_[lw]|se|sampling_offsets|attention_weights"
    r"|relative_position\w*|gate_fn)(?:\.|$)"
)


def split_name(name: str) -> tuple[str, str]:
    """(block, role) of a dotted name; role "linear" where the name tells nothing."""
    match = _NAME.match(name)
    if match is None:
        numbered = _NUMBERED.match(name)
        return (numbered.group(1) if numbered else ""), "linear"
    group = next(
        key
        for key, value in match.groupdict().items()
        if value is not None and key.startswith(("mhsa_", "ffn_", "block_", "pool_", "poolffn_"))
    )
    block = match["pool"] or match["block"]
    if second := match["second"] or match["second_ffn"]:
        block = f"{block}.{'inner' if second.endswith('_in') else second}"
    return block, group.partition("_")[2]


def kind_of(name: str) -> str | None:
    """ "attention" or "FFN" for a linear that is part of one, as far as its name tells.

    Args:
        name: dotted; of a known role or not.
    """
    role = split_name(name)[1]
    if role != "linear":
        return "attention" if role in MHSA_ROLES else "FFN"
    if _AUXILIARY.search(name):
        return None
    return "attention" if _OF_ATTENTION.search(name) else "FFN" if _OF_FFN.search(name) else None


def fit_roles(sites: Mapping[str, Site], block_of: Mapping[str, str]) -> dict[str, Site]:
    """The sites with the roles that their shapes bear out.

    A qkv of two widths is k and v alone (GCViT's global attention), and one that is no whole number
    of them has no role (keys narrower than values). Of an FFN's w1, w2, w3 the one that narrows is
    fc2, the first of two others the gate; an fc1 of twice fc2's width is both in one. An FFN
    outside numbered blocks counts beside an attention alone.

    Args:
        sites: name → site with the role of its name.
        block_of: name → its block.
    """
    blocks: dict[str, dict[str, Site]] = {}
    for name, site in sites.items():
        if site.role != "linear":
            blocks.setdefault(block_of[name], {})[name] = site
    fitted = dict(sites)
    for block, members in blocks.items():
        fitted |= _fit_attention(members)
        fitted |= _fit_ffn({n: s for n, s in members.items() if s.role in FFN_ROLES})
        if not re.search(r"\d", block) and not any(
            fitted[name].role in MHSA_ROLES for name in members
        ):
            fitted |= {name: replace(site, role="linear") for name, site in members.items()}
    return fitted


def _fit_attention(members: Mapping[str, Site]) -> dict[str, Site]:
    fitted: dict[str, Site] = {}
    inner = next((s.in_features for s in members.values() if s.role == "o"), None)
    for name, site in members.items():
        if site.role not in ("qkv", "kv", "qk"):
            continue
        width = inner or site.out_features // site.slices
        role = {3 * width: "qkv", 2 * width: "kv" if site.role == "qkv" else site.role}.get(
            site.out_features, "linear"
        )
        if role == "linear" and site.role == "qk" and site.out_features % 2 == 0:
            role = "qk"  # queries and keys may be narrower than values
        fitted[name] = replace(site, role=role)
    if any(site.role == "linear" for site in fitted.values()):
        fitted |= {n: replace(s, role="linear") for n, s in members.items() if s.role == "o"}
    return fitted


def _fit_ffn(members: Mapping[str, Site]) -> dict[str, Site]:
    fitted = dict(members)
    lettered = {n: s for n, s in members.items() if re.search(r"\.w\d+$", n)}
    widening = [name for name, site in lettered.items() if site.in_features < site.out_features]
    for name, site in lettered.items():
        gate = len(widening) == 2 and name == widening[0]
        role = ("gate" if gate else "fc1") if name in widening else "fc2"
        fitted[name] = replace(site, role=role)
    hidden = next((s.in_features for s in fitted.values() if s.role == "fc2"), 0)
    for name, site in fitted.items():
        if site.role == "fc1" and site.out_features == 2 * hidden:
            fitted[name] = replace(site, role="gate_fc1")
    return fitted
