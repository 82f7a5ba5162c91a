"""BERT and image weights from files give the outputs of the libraries they come from."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

from softmask.models.config import VisionConfig
from softmask.models.layers.bert_weights import convert, read_state
from softmask.models.layers.packing import Packing
from softmask.models.layers.vision import GlobalBatchNorm, VisionEncoder
from softmask.models.softmask_pp.backbone import Backbone
from tests.support.model_fixtures import small_config


@pytest.fixture
def hugging_face(tmp_path):
    """A BertForMaskedLM of the small configuration's size, saved by transformers."""
    torch.manual_seed(0)
    text = small_config().text
    config = transformers.BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_attention_heads=text.heads,
        num_hidden_layers=text.text_layers + text.fusion_layers,
        intermediate_size=text.intermediate_size,
        max_position_embeddings=text.max_positions,
    )
    model = transformers.BertForMaskedLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def _inputs():
    input_ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    return input_ids, attention_mask


def test_text_and_fusion_layers_equal_bert(hugging_face):
    theirs, folder = hugging_face
    config = small_config(text={"checkpoint": str(folder)})
    ours = Backbone(config).eval()
    input_ids, mask = _inputs()
    with torch.no_grad():
        expected = theirs.bert(input_ids, attention_mask=mask.long(), output_hidden_states=True)
        packing = Packing.of(mask)
        tokens = ours.text(input_ids, packing)
        states = tokens
        for layer in ours.fusion.layers:  # without its cross-attention a fusion layer is BERT's
            states = layer.feed_forward(layer.self_attention(states, packing))
        logits = ours.predict_tokens(states)
        expected_logits = theirs(input_ids, attention_mask=mask.long()).logits
    middle = expected.hidden_states[config.text.text_layers]
    torch.testing.assert_close(tokens, middle[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, expected.last_hidden_state[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits[mask], rtol=1e-4, atol=1e-3)


def test_old_names_and_binary_files_are_read(hugging_face):
    _, folder = hugging_face
    state = read_state(folder)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    sizes = {"text_layers": 1, "fusion_layers": 3}
    again = convert(read_state(folder), **sizes)
    for name, tensor in convert(state, **sizes).items():
        assert torch.equal(again[name], tensor), name


def test_error_says_how_a_checkpoint_differs(hugging_face, tmp_path):
    _, folder = hugging_face
    with pytest.raises(ValueError, match=r"at least 5 layers.*encoder\.layer\.4"):
        Backbone(small_config(text={"checkpoint": str(folder), "text_layers": 2}))
    with pytest.raises(ValueError, match=r"text\.embeddings\.word\.weight of shape \(61, 32\), got \(60, 32\)"):
        Backbone(small_config(text={"checkpoint": str(folder), "vocab_size": 61}))
    with pytest.raises(FileNotFoundError, match="model.safetensors or pytorch_model.bin"):
        Backbone(small_config(text={"checkpoint": str(tmp_path / "nowhere")}))


def test_timm_vit_loads_a_file_and_resizes_its_positions(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    options = {"name": "vit_tiny_patch16_224", "checkpoint": str(tmp_path / "vit.pth")}
    same = VisionEncoder(VisionConfig(image_size=224, **options)).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(same(images), theirs.forward_features(images))
    larger = VisionEncoder(VisionConfig(image_size=256, **options)).eval()
    assert larger.patch_grid == (16, 16) and larger.num_prefix_tokens == 1
    assert larger(torch.randn(1, 3, 256, 256)).shape == (1, 257, 192)


def test_file_that_does_not_fill_the_encoder_is_refused(tmp_path):
    """timm itself would load what fits and train the rest from random weights."""
    file = tmp_path / "vit.pth"
    config = VisionConfig(name="vit_tiny_patch16_224", image_size=32, checkpoint=str(file))
    own = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    without = {name: tensor for name, tensor in own.items() if not name.startswith("blocks.11.")}
    foreign = {f"vit.encoder.{name}": tensor for name, tensor in own.items()}
    wider = own | {"norm.weight": torch.ones(193)}
    for content, message in (
        (without, "fills 138 of 150 tensors of the encoder; it lacks 'blocks.11.norm1.weight'"),
        (foreign, "fills 0 of 150 tensors .* holds 'vit.encoder.cls_token': expected timm's names"),
        (wider, r"expected norm.weight of shape \(192,\), got \(193,\)"),
        ({"step": 3}, "vit.pth holds no weights"),
        ([1, 2], "vit.pth holds no weights"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=message) as error:
            VisionEncoder(config)
        assert "\n" not in str(error.value)
    for content, message in (
        (b"nonsense", "vit.pth holds no weights"),
        (b"", "vit.pth holds no weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            VisionEncoder(config)
    file.unlink()
    with pytest.raises(ValueError, match="vit.pth: no such file"):
        VisionEncoder(config)


def test_loading_reports_the_tensors_it_used(tmp_path, hugging_face):
    torch.save({"model": timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict()}, tmp_path / "vit.pth")
    options = {"name": "vit_tiny_patch16_224", "image_size": 32}
    encoder = VisionEncoder(VisionConfig(**options, checkpoint=str(tmp_path / "vit.pth")))
    assert encoder.weights_from == f"150 tensors of {tmp_path}/vit.pth, 2 of the file unused (head.weight ...)"
    assert VisionEncoder(VisionConfig(**options)).weights_from == "random"
    _, folder = hugging_face
    assert f" tensors of {folder}, " in Backbone(small_config(text={"checkpoint": str(folder)})).text_from


def test_timm_model_without_a_class_token_is_pooled_or_refused():
    name = "vit_medium_patch16_gap_240"
    with pytest.raises(ValueError, match="class token"):
        VisionEncoder(VisionConfig(name=name, image_size=32))
    encoder = VisionEncoder(VisionConfig(name=name, image_size=32, pool="mean"))
    tokens = encoder(torch.randn(2, 3, 32, 32))
    assert encoder.num_prefix_tokens == 0 and tokens.shape == (2, 4, 512)
    torch.testing.assert_close(encoder.pool(tokens), tokens.mean(1))
    with pytest.raises(ValueError, match="pool: expected 'cls' or 'mean'"):
        VisionConfig(pool="max")


def test_global_batch_norm_on_one_rank_equals_torch():
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(5), torch.nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.eval()(x), theirs.eval()(x))
