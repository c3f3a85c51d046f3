"""Pictures, captions and spoken descriptions, any of them missing: what category is a stamp of Tux Paint's in?

pip install attnfuse[stamps] && apt-get install tuxpaint-stamps-default
python examples/trimodal.py
"""

import argparse
from itertools import combinations

import torch
from torch import nn

from attnfuse.fusion import ModalityDropout, MultimodalTransformer
from attnfuse.stamps import FOLDER, draw_samples, stamps

parser = argparse.ArgumentParser()
parser.add_argument("--folder", default=FOLDER, help="where the stamps are")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--dropout", type=float, default=0.2, help="on tokens and on the representation")
parser.add_argument("--hide", type=float, default=0.15, help="probability of hiding a modality in training")
parser.add_argument("--seeds", type=int, default=1, help="how many models to train and average")
parser.add_argument("--picture", default="stamps.png", help="where to draw some samples; they hold GPL-2 artwork")
parser.add_argument("--no-artwork", action="store_true", help="draw names and attention only, for publishing")
options = parser.parse_args()

print(f"reading {options.folder}")
data = stamps(options.folder)
names = list(data.dims)
subsets = [subset for size in (3, 2, 1) for subset in combinations(names, size)]


def train(seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    fusion = MultimodalTransformer(data.dims, 32, num_heads=4, num_layers=1, max_lengths=data.max_lengths)
    drop = nn.Dropout(options.dropout)  # on what comes in: dropout inside the attention is slow on a CPU
    head = nn.Sequential(nn.Dropout(options.dropout), nn.Linear(32, len(data.categories)))
    hide = ModalityDropout(options.hide)  # on top of what is missing anyway
    parameters = [*fusion.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.05)
    steps = options.epochs * -(-len(data.train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(options.epochs):
        for batch in data.train.batches(64, generator):
            noisy = {name: drop(x) for name, x in batch.inputs.items()}
            out = fusion(noisy, batch.mask, hide(batch.present))
            loss = nn.functional.cross_entropy(head(out.fused), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"seed {seed}, epoch {epoch + 1} of {options.epochs}: loss {loss.item():.2f}", flush=True)
    return fusion.eval(), head.eval()


models = [train(seed) for seed in range(options.seeds)]
common = torch.bincount(data.train.label).argmax()
for title, split in (("validation, where settings are chosen", data.val), ("test", data.test)):
    complete = split.present.all(1)
    print(f"\n{title}: {len(split)} stamps, {int(complete.sum())} of them with all parts")
    for subset in subsets:
        present = split.present & torch.tensor([name in subset for name in names])
        with torch.no_grad():
            outs = [fusion(split.inputs, split.mask, present) for fusion, _ in models]
            logits = torch.stack([head(out.fused) for out, (_, head) in zip(outs, models)])
        right = (logits.argmax(-1) == split.label).float()
        every, whole = right.mean(1), right[:, complete].mean(1)
        mass = torch.stack([out.source_mass[present.any(1)].mean(0) for out in outs]).mean(0)
        share = ", ".join(f"{name} {part:.2f}" for name, part in zip(names, mass) if name in subset)
        print(f"{' + '.join(subset):26} {every.mean():.3f} ± {every.std(correction=0):.3f}   "
              f"with all parts {whole.mean():.3f} ± {whole.std(correction=0):.3f}   attention: {share}")  # fmt: skip
    print(f"{'always ' + data.categories[common]:26} {(split.label == common).float().mean():.3f}")

draw_samples(options.picture, data, data.test, *models[0], artwork=not options.no_artwork)
print(f"\ndrawn: {options.picture}")
