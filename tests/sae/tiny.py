"""Tiny random autoencoders for the tiny random models of tests/families.py, and what they do, written out by hand."""

import torch

from mechinterp.hooked.sites import Site
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.architectures import make
from mechinterp.sae.autoencoder import SAEConfig
from mechinterp.sae.metadata import Metadata


def tiny_sae(of, site, writes=None, architecture="topk", d_sae=64, exclusion=None, n_sites=1, skip=False, seed=0):
    """An autoencoder of a site (a transcoder with `writes`) whose every weight matters."""
    writes = writes or site
    width = lambda one: max(1, of.axis_size(one)) * of.width(of.resolve(one))  # noqa: E731
    hooks = lambda one: tuple(one.at(one.layer + i).hook_name for i in range(n_sites))  # noqa: E731
    config = SAEConfig(
        architecture,
        n_sites * width(site),
        d_sae,
        k=6 if architecture in ("topk", "batchtopk") else None,
        d_out=n_sites * width(writes),
        centred=site == writes,
        skip=skip,
        n_sites=n_sites,
    )
    metadata = Metadata(of.info.name, hooks(site), hooks(writes), exclusion or Exclusion())
    sae = make(config, metadata, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if name in ("W_enc", "W_dec"):
                weight.copy_(noise / weight.shape[1] ** 0.5)
            elif name == "threshold":
                weight.copy_((0.5 * noise - 0.5).exp())
            elif name == "W_skip":
                weight.copy_(0.3 * noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(0.1 * noise)
        if architecture == "batchtopk":
            sae.threshold.fill_(0.8)
    return sae


def by_hand(sae, x):
    """Dense features and reconstruction of `[… d_in]`, as the papers write them."""
    x = x.to(sae.W_enc.dtype)
    pre = (x - sae.b_dec if sae.config.centred else x) @ sae.W_enc.T + sae.b_enc
    if sae.config.architecture == "topk":
        smallest = pre.topk(sae.config.k, dim=-1).values[..., -1:]
        features = pre.relu() * (pre >= smallest)
    elif sae.config.architecture in ("jumprelu", "batchtopk"):
        features = pre * (pre > sae.threshold)
    else:
        features = pre.relu()
    made = features @ sae.W_dec + sae.b_dec
    return features, made if sae.W_skip is None else made + x @ sae.W_skip.T


def kept_by_hand(prompts, excluded=()):
    """`[prompt pos]`: all but padding, the first token and some token ids."""
    kept = prompts.real.clone()
    for i in range(len(prompts)):
        kept[i, int(prompts.padding[i])] = False
    for token in excluded:
        kept &= prompts.tokens != token
    return kept


RESID = Site("resid_post", 1)
