"""Lets torchvision's CUDA wheel be imported beside a CPU build of torch, for the vLLM test server.

Its compiled operators cannot load there, and torchvision's registrations then fail on their names.
The names alone are enough: image resizing uses none of them.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_operators = self.library  # the declarations live as long as this object
        return None


sys.meta_path.insert(0, _DeclareOperators())
