"""Checkpoints as training leaves them, and how a published one is looked at."""

import argparse
from pathlib import Path

import numpy as np
import torch


def network(value):
    torch.manual_seed(value)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def trained(net, **more):
    """Return what a training loop of MMEngine leaves, without averaging."""
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(1, 3, 9, 9)).sum().backward()
    optimizer.step()
    return {
        "meta": {
            "cfg": "work_dir = '/home/ann/secret'",
            "env_info": "gpu7.example.org",
            "seed": 3,
            "experiment_name": "secret",
            "hook_msgs": {"best_ckpt": "/home/ann/best.pth"},
            "mmdet_version": "3.3.0",
            "dataset_meta": {"classes": ("cat", "dog"), "palette": [(1, 2, 3)], "ann_file": "/home/ann/a.json"},
            "epoch": 12,
        },
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"last_step": np.float64(3)}],
        "args": argparse.Namespace(output_dir=Path("/home/ann"), lr=0.1),
        **more,
    }


def saved(path, value, **how):
    torch.save(value, path, **how)
    return path


def same(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def read(path):
    return torch.load(path, weights_only=True)
