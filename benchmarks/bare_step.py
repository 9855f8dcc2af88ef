"""One student-teacher training step in a few lines: the time that PyTorch alone takes.

    python benchmarks/bare_step.py SETTINGS

SETTINGS as in `benchmarks.work`; uses bfloat16 where the hardware has it, as we do.
"""

import json
import sys
import time

import timm
import torch
import torch.nn.functional as F

settings = json.loads(sys.argv[1])
side, device = settings["image_size"], "cuda" if torch.cuda.is_available() else "cpu"
native = torch.cpu._is_avx512_bf16_supported() or torch.cuda.is_available()
options = {"features_only": True, "out_indices": (1, 2, 3)}
teacher = timm.create_model(settings["backbone"], **options).to(device).eval()
student = timm.create_model(settings["backbone"], **options).to(device)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
images = torch.rand(settings["batch_size"], 3, side, side, device=device)
images = images.contiguous(memory_format=torch.channels_last)
with torch.autocast(device, torch.bfloat16, enabled=native):
    with torch.no_grad():
        known = teacher(images)
    pairs = zip(known, student(images), strict=True)
    loss = sum((F.normalize(t) - F.normalize(s)).square().mean() for t, s in pairs)
loss.backward()
optimizer.step()
loss.item()
print(json.dumps({"done": time.time()}))
