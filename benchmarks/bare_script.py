"""A table, an MLP and a loop, as one writes them in a notebook: what startup.py compares train.py with.

    python benchmarks/bare_script.py table.csv

The table is CSV: numbers, and a column "target" of 0 and 1.
"""

import sys

import pandas
import torch
from torch import nn

table = pandas.read_csv(sys.argv[1])
target = torch.tensor(table.pop("target").to_numpy(), dtype=torch.float32)
numeric = torch.tensor(table.to_numpy(), dtype=torch.float32)

order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
valid, train = order[: len(order) // 5], order[len(order) // 5 :]
mean, std = numeric[train].mean(0), numeric[train].std(0)
numeric = (numeric - mean) / std

layers: list[nn.Module] = []
width = numeric.shape[1]
for _ in range(3):
    layers += [nn.Linear(width, 256), nn.LayerNorm(256), nn.ReLU()]
    width = 256
model = nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

for indices in train[torch.randperm(len(train))].split(256):
    loss = nn.functional.binary_cross_entropy_with_logits(model(numeric[indices]), target[indices])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
