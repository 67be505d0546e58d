"""MACs of PyTorch modules against figures worked out by hand, and of torchvision's detectors against its own."""

import math

import pytest
import torch
from dettools.flops.torch_count import count_call
from dettools.flops.torch_detector import count_detector, input_size, size_of_image
from dettools.flops.torch_operators import deform_conv_macs
from torch import nn
from torch.nn import functional
from torchvision.models import get_model, get_model_weights, resnet50
from torchvision.ops import DeformConv2d, RoIAlign, nms

# torchvision states its detectors' `_ops` (in 1e9 MACs, without RoIAlign) for an 800 × 800 px input. The pyramid scales
# with the area, so that they are checked at 1/100 of it where the layers' sizes stay whole.
COCO_CLASSES = 91


class Attention(nn.Module):
    def forward(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key, value)


class Resized(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return functional.interpolate(x, scale_factor=2, mode=self.mode)


def macs(module, *inputs):
    return count_call(module.eval(), *inputs).macs


@pytest.mark.parametrize(
    ("module", "shape", "by_hand"),
    [
        # output values × channels in × kernel; a bias is an addition and no MAC
        (nn.Conv2d(3, 8, 3, bias=True), (1, 3, 10, 12), 8 * 8 * 10 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 10, 12), 2 * 8 * 5 * 6 * 3 * 9),
        (nn.Conv2d(8, 8, 3, dilation=2), (1, 8, 10, 12), 8 * 6 * 8 * 8 * 9),
        (nn.Conv2d(8, 12, 3, groups=4, padding=1), (1, 8, 5, 5), 12 * 25 * 2 * 9),
        (nn.Conv2d(8, 8, 5, groups=8), (1, 8, 9, 9), 8 * 25 * 25),
        # input values × channels out × kernel
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 7, 7), 4 * 49 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 7, 7), 4 * 49 * 3 * 9),
        (nn.Linear(10, 7), (3, 10), 3 * 10 * 7),
        (nn.Linear(10, 7), (2, 3, 10), 6 * 10 * 7),
        (Resized("nearest"), (1, 4, 5, 6), 0),
        # four weighted neighbours for each value
        (Resized("bilinear"), (1, 4, 5, 6), 4 * 10 * 12 * 4),
    ],
)
def test_layers_cost_what_they_cost_by_hand(module, shape, by_hand):
    assert macs(module, torch.rand(shape)) == by_hand


def test_attention_is_two_matrix_products():
    query, key, value = torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, 8)
    assert macs(Attention(), query, key, value) == 2 * 3 * 5 * 7 * (8 + 8)


def test_a_transformer_layer_is_not_hidden_behind_its_fused_operator():
    tokens, width, hidden = 2 * 10, 32, 64
    by_hand = tokens * width * (3 * width + width + 2 * hidden) + 2 * 10 * 10 * 2 * width
    assert macs(nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True), torch.rand(2, 10, width)) == by_hand


@pytest.mark.parametrize(
    ("sampling_ratio", "samples"),
    # The RoI of 15 × 10 px over 7 × 7 bins: ceil(15 / 7) × ceil(10 / 7) samples a bin when the ratio is left open.
    [(2, 4), (3, 9), (0, 3 * 2)],
)
def test_roi_align_weighs_four_pixels_a_sample(sampling_ratio, samples):
    rois = torch.tensor([[0.0, 2.0, 1.0, 12.0, 16.0]])
    align = RoIAlign((7, 7), spatial_scale=1.0, sampling_ratio=sampling_ratio)
    assert macs(align, torch.rand(1, 8, 20, 20), rois) == 8 * 49 * samples * 4


def test_roi_align_of_no_roi_costs_nothing():
    assert macs(RoIAlign((7, 7), 1.0, 2), torch.rand(1, 8, 20, 20), torch.zeros(0, 5)) == 0


def test_a_deformable_convolution_is_the_convolution_and_its_samples():
    layer = DeformConv2d(4, 6, 3, padding=1)
    found = macs(layer, torch.rand(1, 4, 5, 5), torch.rand(1, 18, 5, 5))
    assert found == 6 * 25 * 4 * 9 + 4 * (25 * 4 * 9)
    assert found == deform_conv_macs((1, 6, 5, 5), (6, 4, 3, 3), 4)


def test_what_has_no_formula_is_listed():
    class Rest(nn.Module):
        def forward(self, boxes, scores):
            kept = nms(boxes, scores, 0.5)
            return torch.cat([boxes[kept], boxes[kept]]).sigmoid()

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    count = count_call(Rest(), boxes, torch.tensor([0.9, 0.8]))
    found = {one.operator: (one.kind, one.calls, one.elements) for one in count.uncounted}
    assert count.macs == 0
    assert found["torchvision.nms"] == ("comparisons", 1, 2)
    assert found["aten.cat"] == ("copies", 1, 16)
    assert found["aten.sigmoid"] == ("arithmetic", 1, 16)
    assert count.elements == sum(elements for _, _, elements in found.values())


def test_views_and_in_place_operators_write_no_activation():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(inplace=True), nn.Flatten())
    count = count_call(net, torch.rand(1, 1, 4, 4))
    assert count.activation_bytes == count.largest_activation_bytes == 2 * 16 * 4
    assert [one.operator for one in count.uncounted] == ["aten.relu_"]


def test_resnet50_is_4_09_billion_multiply_accumulates():
    count = count_call(resnet50(weights=None).eval(), torch.rand(1, 3, 224, 224))
    assert count.macs == pytest.approx(4.09e9, rel=0.01)
    assert count.by_module["fc"] == 2048 * 1000
    assert count.by_module[""] == count.macs
    assert count.by_module["conv1"] == 64 * 112 * 112 * 3 * 49


def detector(builder, **options):
    model = get_model(builder, weights=None, weights_backbone=None, **options).eval()
    return model, float(next(iter(get_model_weights(builder))).meta["_ops"])


def test_ssdlite_costs_what_torchvision_states():
    model, stated = detector("ssdlite320_mobilenet_v3_large")
    cost = count_detector(model, input_size(model, None), subject="", max_detections=100)
    assert cost.macs / 1e9 == pytest.approx(stated, abs=0.0005)
    assert cost.parts == ()


def test_the_mobilenet_faster_rcnn_costs_what_torchvision_states_without_proposals():
    model, stated = detector("fasterrcnn_mobilenet_v3_large_fpn")
    cost = count_detector(model, input_size(model, (800, 800)), subject="", max_detections=100)
    assert cost.macs / 1e9 == pytest.approx(stated, abs=0.0005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("builder", "proposals", "detections"),
    [
        # What torchvision's figures contain: 1000 proposals, and the masks of 100 detections or of none.
        ("fasterrcnn_resnet50_fpn", 1000, 0),
        ("fasterrcnn_resnet50_fpn_v2", 1000, 0),
        ("maskrcnn_resnet50_fpn", 1000, 0),
        ("maskrcnn_resnet50_fpn_v2", 1000, 100),
        ("keypointrcnn_resnet50_fpn", 1000, 0),
        ("retinanet_resnet50_fpn", 0, 0),
        ("retinanet_resnet50_fpn_v2", 0, 0),
        ("fcos_resnet50_fpn", 0, 0),
        ("ssd300_vgg16", 0, 0),
    ],
)
def test_detectors_cost_what_torchvision_states(builder, proposals, detections):
    model, stated = detector(builder)
    cost = count_detector(model, input_size(model, (800, 800)), subject="", max_detections=100)
    items = {"proposal": proposals, "detection": detections}
    aligned = next((share for share in cost.operators if share.name == "torchvision.roi_align"), None)
    found = cost.macs
    for place, part in enumerate(cost.parts):
        # torchvision does not count RoIAlign.
        found += items[part.item] * (part.macs - (aligned.per_item[place] if aligned else 0))
    assert found / 1e9 == pytest.approx(stated, abs=0.0006)


@pytest.mark.parametrize(
    "builder", ["fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
)
def test_the_range_is_linear_in_proposals_and_detections(builder):
    """The model's own forward, with as many proposals and detections as it finds, costs what the range says."""
    torch.manual_seed(2)
    options = {"rpn_post_nms_top_n_test": 7, "box_detections_per_img": 3, "box_score_thresh": 0.0}
    model, _ = detector(builder, num_classes=2, **options)
    image = torch.rand(3, 64, 96)
    cost = count_detector(model, input_size(model, (64, 96)), subject="", max_detections=3)
    assert cost.parts[0].most == 7
    model.transform.min_size, model.transform.max_size = (64,), 96
    proposals = []
    model.roi_heads.register_forward_pre_hook(lambda _, inputs: proposals.append(len(inputs[1][0])))
    with torch.no_grad():
        found = {"detection": len(model([image])[0]["scores"]), "proposal": proposals[0]}
    whole = count_call(model, [image])
    assert min(found.values()) > 1
    # Without the model's own transform, which resizes by the factor 1 and pastes masks.
    network = sum(whole.by_module[name] for name in ("backbone", "rpn", "roi_heads"))
    assert network == cost.macs + sum(found[part.item] * part.macs for part in cost.parts)


def test_module_paths_and_parameters_add_up():
    model, _ = detector("fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=3)
    cost = count_detector(model, input_size(model, (64, 64)), subject="", max_detections=10, max_proposals=20)
    modules = {share.name: share for share in cost.modules}
    assert [name for name in modules if "." not in name] == ["backbone", "rpn", "roi_heads"]
    assert sum(modules[name].macs for name in ("backbone", "rpn")) == cost.macs
    assert modules["roi_heads"].per_item == (cost.parts[0].macs,)
    assert modules["roi_heads"].most(cost.parts) == 20 * cost.parts[0].macs
    assert sum(share.most(cost.parts) for share in cost.operators) == cost.most_macs
    assert cost.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert "filter_proposals" not in vars(model.rpn)


def test_the_input_is_padded_as_served():
    model, _ = detector("retinanet_resnet50_fpn", num_classes=2)
    size = input_size(model, (800, 1333))
    assert (size.resized, size.padded) == ((800, 1333), (800, 1344))
    assert "padded from 800×1333 to multiples of 32 px" in size.note
    assert input_size(model, None).resized == (800, 1333)
    assert size_of_image(model, (480, 640)) == (800, 1066)


def test_a_fixed_size_says_that_it_is_fixed():
    model, _ = detector("ssd300_vgg16", num_classes=2)
    size = input_size(model, (800, 1333))
    assert size.padded == (300, 300)
    assert "fixed size 300×300" in size.note
    assert input_size(model, (300, 300)).note == ""


def test_a_convolution_over_more_pixels_costs_in_proportion():
    layer = nn.Conv2d(3, 4, 1)
    assert (
        macs(layer, torch.rand(1, 3, 20, 20)) == 4 * macs(layer, torch.rand(1, 3, 10, 10)) == 4 * math.prod((4, 100, 3))
    )
