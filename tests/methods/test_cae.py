"""CAE equal to the authors' two code bases and to MMSelfSup: regressor, losses, gradients, several steps."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor

from sslcli.backbones import beit, resnet, vit
from sslcli.config import load
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.engine.optim import param_groups
from sslcli.errors import UserError, WeightsError
from sslcli.methods import cae
from sslcli.nn.dalle import Encoder
from sslcli.nn.patches import patches_of, visible_and_masked
from sslcli.nn.regressor import CrossBlock, Regressor

FACTS = RunFacts(images=100, batch_size=2, part_size=2, steps_per_epoch=10, total_steps=100)
NAMES = (
    (r"^(encoder|backbone)\.", "backbone.trunk."),
    (r"^(regresser\.|pretext_neck\.|neck\.)(regressor_blocks|regressors)\.", "regressor.blocks."),
    (r"^(decoder|pretext_neck|neck)\.(decoder_blocks|decoders)\.", "decoder."),
    (r"^(decoder|pretext_neck|neck)\.head\.", "head."),
    (r"^(regresser\.norm|neck\.norm_regressor)\.", "regressor.norm."),
    (r"^pretext_neck\.norm\.", "regressor.norm."),
    (r"^(decoder\.norm|pretext_neck\.norm2|neck\.norm_decoder)\.", "decoder.LAST."),
    (r"^encoder_to_regresser\.", "adapter.0."),
    (r"^encoder_to_regresser_norm\.", "adapter.1."),
    (r"^neck\.mask_token$", "mask_token"),
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.layers\.(\d)", r".blocks.\1"),
    (r"\.trunk\.ln1\.", ".trunk.norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.blocks\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.blocks\.1\.", ".mlp.fc2."),
    (r"^(regressor\..*)gamma_([12])_cross$", r"\1scale\2.gamma"),
    (r"^(decoder\..*)gamma_([12])$", r"\1ls\2.gamma"),
    (r"\.norm1_([qkv])(_cross)?\.", r".norm_\1."),
    (r"\.norm2_cross\.", ".norm_out."),
    (r"\.cross_attn\.([qv])_bias$", r".\1.bias"),
    (r"\.cross_attn\.", "."),
    (r"\.mlp_cross\.", ".mlp."),
)


def ours(key: str, depth: int) -> str:
    """Our name of a reference's tensor; `depth` of the decoder."""
    for theirs, mine in NAMES:
        key = re.sub(theirs, mine, key)
    return key.replace("LAST", str(depth))


def put(method: torch.nn.Module, tensors: dict[str, Tensor], depth: int = 1) -> None:
    """Give the method the reference's tensors, all of them and no others."""
    own = method.state_dict()
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = ours(key, depth)
        if name.startswith("decoder.") and name.endswith(("q_bias", "v_bias")):  # one tensor here, the keys' part 0
            name = name[: -len("q_bias")] + "qkv.bias"
            whole = state.setdefault(name, torch.zeros_like(own[name]))
            whole.chunk(3)[2 if key.endswith("v_bias") else 0].copy_(value)
        else:
            state[name] = value.reshape(own[name].shape)
    missing, unexpected = method.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key == "tokenizer_digest" or key.startswith("slow_backbone.") for key in missing)


def got(found: dict[str, Tensor], key: str, depth: int = 1) -> Tensor:
    """Our tensor, or gradient, that goes by the reference's name."""
    name = ours(key, depth)
    if name.startswith("decoder.") and name.endswith(("q_bias", "v_bias")):
        return found[name[: -len("q_bias")] + "qkv.bias"].chunk(3)[2 if key.endswith("v_bias") else 0]
    return found[name]


def sizes(meta: dict) -> dict[str, Any]:
    """What a recording says of its network."""
    names = [ours(key, 99) for key in meta["filled"]]

    def count(pattern: str) -> int:
        return 1 + max(int(found[1]) for key in names if (found := re.match(pattern, key)))

    if "arch" in meta:
        width, heads = meta["arch"]["embed_dims"], meta["arch"]["num_heads"]
        size = {"width": width, "heads": heads, "inner": width, "inner_heads": heads, "words": meta["num_classes"],
                "patch": meta["patch"], "grid": meta["img"] // meta["patch"]}  # fmt: skip
    else:
        given = meta["kwargs"]
        width = given.get("D", 24)
        size = {"width": width, "heads": given.get("h", 3), "inner": given.get("dd", width),
                "inner_heads": given.get("dh", 3), "words": given.get("nc", 20), "patch": 4, "grid": 4}  # fmt: skip
    return size | {
        "depth": count(r"backbone\.trunk\.blocks\.(\d)"),
        "regressor_depth": count(r"regressor\.blocks\.(\d)"),
        "decoder_depth": count(r"decoder\.(\d)\."),
        "scale": "backbone.trunk.blocks.0.gamma_1" in names,
        "inner_scale": "decoder.0.ls1.gamma" in names,
    }


def method_of(meta: dict, filled: Callable, aligned_with: str) -> cae.CAE:
    """The method with the network and the weights of a recording."""
    size = sizes(meta)
    backbone = beit.build(beit.Config(
        width=size["width"], depth=size["depth"], heads=size["heads"], patch=size["patch"],
        image_size=size["grid"] * size["patch"], positions="sincos", bias="none",
        layer_scale=0.1 if size["scale"] else None,
    ))  # fmt: skip
    depth = size["decoder_depth"]
    method = cae.build(cae.Config(
        tokenizer=Path("none"), words=size["words"], width=size["inner"], heads=size["inner_heads"],
        aligned_with=aligned_with, regressor_depth=size["regressor_depth"], decoder_depth=depth,
        layer_scale=0.1 if size["inner_scale"] else None,
    ), backbone, FACTS).double()  # fmt: skip
    give_gains(method.regressor.blocks, size["inner"])
    own = dict(method.state_dict())
    tensors = {key: torch.from_numpy(filled(key, list(got(own, key, depth).shape))) for key in meta["filled"]
               if not re.match("alignment_encoder|teacher", key)}  # fmt: skip
    tensors["encoder.pos_embed"] = own["backbone.trunk.pos_embed"]
    put(method, tensors, depth)
    method.copy_student()
    return method


def give_gains(blocks: Iterable[CrossBlock], width: int) -> None:
    """Where there are none, the regressor of the references multiplies with gains all the same, which do not learn."""
    for block in blocks:
        if isinstance(block.scale1, torch.nn.Identity):
            block.scale1, block.scale2 = (LayerScale(width).double().requires_grad_(False) for _ in range(2))


def at(step: int) -> Progress:
    return Progress(step=step, total=100, steps_per_epoch=10, seed=0)


def loss_of(method: cae.CAE, images: Tensor, masks: Tensor, words: Tensor, monkeypatch: pytest.MonkeyPatch, step: int):
    monkeypatch.setattr(method, "words_of", lambda batch: words)
    return method(Batch(views=[images], index=torch.arange(len(images)), masks=masks), at(step))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["forward_atten_d16_dec24", "forward_atten_d20_noscale", "forward_lxt_d24_m10"])
def test_the_whole_method_as_the_authors_have_it(golden: Path, filled: Callable, monkeypatch, name: str):
    case = np.load(golden / "cae" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method = method_of(meta, filled, "current")
    depth = method.cfg.decoder_depth
    np.testing.assert_allclose(method.backbone.trunk.pos_embed.detach(), case["encoder_pos_embed"], atol=1e-7)
    images, masks = torch.from_numpy(case["imgs"]), torch.from_numpy(case["mask"])
    visible, hidden = visible_and_masked(masks, None)
    decoded, foreseen, true = method.decoded(images, masks, visible, hidden)
    close = {"rtol": 1e-6, "atol": 1e-7}  # positions are rounded to float32, not always alike
    np.testing.assert_allclose(method.backbone.visible_tokens(images, visible).detach(), case["encoder_out"], **close)
    np.testing.assert_allclose(decoded.detach().flatten(0, 1), case["logits"], **close)
    np.testing.assert_allclose(foreseen.detach(), case["latent_predict"], **close)
    np.testing.assert_allclose(true, case["latent_target"], **close)
    result = loss_of(method, images, masks, torch.from_numpy(case["labels_full"]), monkeypatch, 0)
    result.loss.backward()
    for value, key in ((result.loss.item(), "loss"), (result.scalars["decoding"], "loss_main"),
                       (result.scalars["alignment"], "loss_align")):  # fmt: skip
        np.testing.assert_allclose(value, case[key], rtol=1e-6)
    path = golden / "cae" / f"{name}.grads.npz"
    if path.exists():
        grads, found = np.load(path), {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        for key in grads:
            grad = got(found, key.removeprefix("grad/"), depth)
            np.testing.assert_allclose(grad.reshape(grads[key].shape), grads[key], err_msg=key, rtol=1e-5, atol=1e-7)
        assert len(grads.files) >= len(found)


def step_(method: cae.CAE, loss: Tensor, lr: float, step: int) -> None:
    """Plain gradient descent, in the engine's order."""
    method.zero_grad()
    loss.backward()
    method.before_update(at(step))
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    method.after_step(at(step))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["engine_steps_atten_d16", "engine_steps_atten_d24", "engine_steps_lxt_d24"])
def test_three_steps_as_the_authors_take_them(golden: Path, filled: Callable, monkeypatch, name: str):
    case = np.load(golden / "cae" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    aligned_with = "current" if case["alignment_shares_storage_after"] else "previous"
    method = method_of(meta, filled, aligned_with)
    for step in range(3):
        images, masks, words = (torch.from_numpy(case[f"{key}{step}"]) for key in ("imgs", "mask", "codes"))
        _, foreseen, true = method.decoded(images, masks, *visible_and_masked(masks, None))
        np.testing.assert_allclose(foreseen.detach(), case[f"latent_predict{step}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(true, case[f"latent_target{step}"], rtol=1e-5, atol=1e-6)
        result = loss_of(method, images, masks, words, monkeypatch, step)
        np.testing.assert_allclose(result.loss.item(), case["losses"][step], rtol=1e-5)
        step_(method, result.loss, float(case["lr"]), step)
    state = method.state_dict()
    for key in (key for key in case if key.startswith("end/") and not re.search("alignment|teacher", key)):
        found = got(state, key.removeprefix("end/"), method.cfg.decoder_depth)
        np.testing.assert_allclose(found.reshape(case[key].shape), case[key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["forward_mmselfsup_d16"])
def test_three_steps_as_mmselfsup_takes_them(golden: Path, filled: Callable, monkeypatch, name: str):
    case = np.load(golden / "cae" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method = method_of(meta, filled, "previous")
    mean, std = (torch.from_numpy(case[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    grads = np.load(golden / "cae" / f"{name}.grads.npz")
    for step in range(3):
        pixels, masks, words = (torch.from_numpy(case[f"{key}{step}"]) for key in ("img01_", "mask", "codes"))
        images = (pixels - mean) / std
        true = method.decoded(images, masks, *visible_and_masked(masks, None))[2]
        np.testing.assert_allclose(true, case[f"latent_target{step}"], rtol=1e-5, atol=1e-6)
        result = loss_of(method, images, masks, words.flatten(1), monkeypatch, step)
        found = [result.loss.item(), float(result.scalars["decoding"]), float(result.scalars["alignment"])]
        np.testing.assert_allclose(sorted(found), sorted(case["losses"][step]), rtol=1e-6)
        step_(method, result.loss, float(case["lr"]), step)
        if step == 0:
            own = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
            for key in grads:
                grad = got(own, key.removeprefix("grad/"), method.cfg.decoder_depth)
                np.testing.assert_allclose(
                    grad.reshape(grads[key].shape), grads[key], err_msg=key, rtol=1e-5, atol=1e-7
                )
    for key, network in (("end_backbone_qkv0", method.backbone), ("end_teacher_qkv0", method.slow_backbone)):
        np.testing.assert_allclose(network.trunk.blocks[0].attn.qkv.weight.detach(), case[key], rtol=1e-6, atol=1e-8)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["big_logits", "equal_latents", "lam0", "n2_l16"])
def test_losses_as_in_mmselfsup(golden: Path, name: str):
    case = {key: torch.from_numpy(v) for key, v in np.load(golden / "cae" / f"loss_mmselfsup_{name}.npz").items()}
    masks = case["mask"]
    _, hidden = visible_and_masked(masks, None)
    logits, foreseen = case["logits"].requires_grad_(), case["latent_pred"].requires_grad_()
    decoded = logits.unflatten(0, (len(masks), -1))
    words = cae.picked(case["codes"].flatten(1), hidden)
    decoding, alignment = cae.losses(decoded, words, foreseen, case["latent_target"], float(case["lambd"]))
    (decoding + alignment).backward()
    for found, key in ((decoding, "loss_main"), (alignment, "loss_align"), (decoding + alignment, "loss"),
                       (logits.grad, "grad_logits"), (foreseen.grad, "grad_latent_pred")):  # fmt: skip
        torch.testing.assert_close(found, case[key], rtol=1e-9, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["n1_m1_u7", "n2_m5_u3", "n2_noscale"])
def test_regressor(golden: Path, filled: Callable, name: str):
    case = {key: v if key == "meta" else torch.from_numpy(v)
            for key, v in np.load(golden / "cae" / f"components_atten_{name}.npz").items()}  # fmt: skip
    meta = json.loads(str(case["meta"]))
    scale = meta["init_values"] or None
    block = CrossBlock(meta["dim"], meta["heads"], 0.0, scale, meta["mlp_ratio_block"]).double()
    regressor = Regressor(meta["dim"], meta["heads"], [0.0] * count_of(meta["layout_latent"]), scale).double()
    regressor.blocks = torch.nn.ModuleList(
        CrossBlock(meta["dim"], meta["heads"], 0.0, scale, meta["mlp_ratio_latent"]).double() for _ in regressor.blocks
    )
    give_gains([block, *regressor.blocks], meta["dim"])
    fill(block, meta["layout_block"], filled, "regresser.regressor_blocks.0.", "regressor.blocks.0.")
    fill(regressor, meta["layout_latent"], filled, "regresser.", "regressor.")
    hidden, seen = case["x_masked"].requires_grad_(), case["x_unmasked"]
    places, seen_places = case["pos_masked"], case["pos_unmasked"]
    out = block(hidden, torch.cat([seen, hidden], dim=1), places, torch.cat([seen_places, places], dim=1))
    torch.testing.assert_close(out, case["regressor_block_out"], rtol=1e-9, atol=1e-9)
    out.square().sum().backward()
    torch.testing.assert_close(hidden.grad, case["grad_x_masked_of_sum_sq"], rtol=1e-9, atol=1e-9)
    latent = regressor(hidden, seen, places, seen_places)
    torch.testing.assert_close(latent, case["latent_regresser_out"], rtol=1e-9, atol=1e-9)


def count_of(layout: dict[str, list[int]]) -> int:
    return 1 + max(int(found[1]) for key in layout if (found := re.match(r"regressor_blocks\.(\d)", key)))


def fill(module: torch.nn.Module, layout: dict[str, list[int]], filled: Callable, theirs: str, mine: str) -> None:
    named = {ours(theirs + key, 1).removeprefix(mine): torch.from_numpy(filled(key, shape))
             for key, shape in layout.items()}  # fmt: skip
    module.load_state_dict(named)


def small(grid: int = 4, **settings: object) -> cae.CAE:
    torch.manual_seed(0)
    backbone = beit.build(beit.Config(
        width=24, depth=1, heads=3, patch=4, image_size=4 * grid, positions="sincos", bias="none",
    ))  # fmt: skip
    return cae.build(cae.Config(**{"heads": 3, "regressor_depth": 1, "decoder_depth": 1, **settings}), backbone, FACTS)


def batch(grid: int = 4, *, targets: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(2, grid**2, dtype=torch.bool)
    masks[:, : grid**2 // 2] = True
    images = torch.randn(2, 3, 4 * grid, 4 * grid, generator=generator)
    looks = [torch.rand(2, 3, 8 * grid, 8 * grid, generator=generator)] if targets else []
    return Batch(views=[images], index=torch.arange(2), masks=masks, masked=grid**2 // 2, targets=looks)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    torch.save(Encoder(8, 1, 16).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def test_words_are_the_tokenizers(tokenizer: Path):
    method, one = small(tokenizer=tokenizer, words=16), batch()
    encoder = Encoder(8, 1, 16)
    encoder.load_state_dict(torch.load(tokenizer))
    assert torch.equal(method.words_of(one), encoder(one.targets[0]).argmax(dim=1).flatten(1))
    result = method(one, at(0))
    assert result.scalars.keys() == {"decoding", "alignment", "words_right"}
    result.loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_the_tokenizer_is_no_part_of_the_state_but_may_not_change(tokenizer: Path):
    method = small(tokenizer=tokenizer, words=16)
    assert not any("tokenizer" in key and key != "tokenizer_digest" for key in method.state_dict())
    method(batch(), at(0))
    again = small(tokenizer=tokenizer, words=16)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again(batch(), at(1)).loss, method(batch(), at(1)).loss)
    torch.save(Encoder(8, 1, 16).state_dict(), tokenizer)
    other = small(tokenizer=tokenizer, words=16)
    other.load_state_dict(method.state_dict())
    with pytest.raises(WeightsError, match="is not the tokenizer that this run began with"):
        other(batch(), at(1))


def test_a_tokenizer_that_does_not_serve_is_refused(tokenizer: Path):
    with pytest.raises(WeightsError, match=r"needs a `method.tokenizer`") as caught:
        small()
    assert "cdn.openai.com" in caught.value.hint
    with pytest.raises(WeightsError, match="no tokenizer `nowhere"):
        small(tokenizer=Path("nowhere.pkl"))(batch(), at(0))
    with pytest.raises(WeightsError, match="has 16 words, and the run is made for 8192"):
        small(tokenizer=tokenizer)(batch(), at(0))
    with pytest.raises(UserError, match="needs images of 32 pixels") as told:
        small(tokenizer=tokenizer, words=16)(batch(targets=False), at(0))
    assert "views.target" in told.value.hint


def test_pixels_need_no_tokenizer():
    method, one = small(target="pixels"), batch(targets=False)
    _, hidden = visible_and_masked(one.masks, None)
    decoded, foreseen, true = method.decoded(one.views[0], one.masks, *visible_and_masked(one.masks, None))
    wanted = cae.picked(patches_of(one.views[0], 4), hidden)
    wanted = (wanted - wanted.mean(dim=2, keepdim=True)) / (wanted.var(dim=2, keepdim=True) + 1e-6).sqrt()
    result = method(one, at(0))
    torch.testing.assert_close(result.loss, (decoded - wanted).square().mean() + 2 * (foreseen - true).square().mean())
    assert result.scalars.keys() == {"decoding", "alignment"}


def test_hidden_pixels_reach_the_prediction_only_as_constants():
    method, one = small(target="pixels"), batch(targets=False)
    images = one.views[0].clone().requires_grad_()
    decoded, foreseen, true = method.decoded(images, one.masks, *visible_and_masked(one.masks, None))
    (decoded.sum() + foreseen.sum()).backward()
    assert not true.requires_grad
    assert images.grad[:, :, 8:].any()
    assert not images.grad[:, :, :8].any()  # the upper half is hidden


def test_branches_are_dropped_in_both_parts():
    method = small(target="pixels", drop_path=0.3, regressor_depth=3, decoder_depth=2)
    rates = [m.drop_prob for part in (method.regressor, method.decoder) for m in part.modules() if type(m) is DropPath]
    assert rates == pytest.approx([0.0, 0.15, 0.3, 0.3, 0.3])


def test_start():
    method = small(target="pixels")
    for layer in (method.head, method.regressor.blocks[0].q):
        wide_out, wide_in = layer.weight.shape
        assert layer.weight.abs().max() <= (6 / (wide_in + wide_out)) ** 0.5
        assert not layer.bias.any()
    assert 0 < method.mask_token.abs().max() <= 0.02
    assert torch.equal(method.regressor.blocks[0].scale1.gamma, torch.full((24,), 0.1))


def test_all_but_biases_and_gains_are_decayed():
    optim = load.load("pretrain", "cae-vitb16-300e").preset.optim
    method = small(target="pixels")
    groups = param_groups(method.named_parameters(), optim, optim.rules)
    free = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert all(re.search(r"bias|norm|gamma|^decoder\.1\.weight", name) for name in free)
    assert {"head.bias", "backbone.trunk.blocks.0.norm1.weight"} < free


def test_start_of_the_encoder():
    trunk = beit.build(beit.Config(
        width=96, depth=4, heads=3, patch=4, image_size=16, positions="sincos", bias="none", init="cae",
    )).trunk  # fmt: skip
    for layer in (trunk.blocks[3].attn.qkv, trunk.blocks[3].attn.proj, trunk.blocks[3].mlp.fc2):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    for tensor in (trunk.patch_embed.proj.weight, trunk.cls_token):
        assert tensor.abs().max().item() == pytest.approx(0.02, rel=0.05)
    assert not trunk.patch_embed.proj.bias.any()
    assert not trunk.blocks[0].attn.q_bias.any()


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="hides patches"):
        cae.build(cae.Config(target="pixels"), resnet.build(resnet.Config(depth=10, width=8, stem="small")), FACTS)
    plain = vit.build(vit.Config(width=24, depth=1, heads=3, patch=4, image_size=16, positions="sincos"))
    method = cae.build(cae.Config(target="pixels", heads=3, regressor_depth=1, decoder_depth=1), plain, FACTS)
    assert method(batch(targets=False), at(0)).loss.isfinite()
