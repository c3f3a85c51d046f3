"""Two modalities, one of them noisy or gone: a multimodal transformer on spoken and handwritten digits.

pip install attnfuse[demo]
python examples/av_digits.py
"""

import argparse

import torch
from torch import nn

from attnfuse.datasets import AUDIO_SNR_DB, IMAGE_NOISE, av_digits
from attnfuse.fusion import ModalityDropout, MultimodalTransformer

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
epochs = parser.parse_args().epochs
torch.manual_seed(0)

# An image is 8 tokens (rows); an utterance is a few dozen at most, and its length is the mask.
# Every training pair draws its own noise, so the model meets good and bad samples of both modalities.
levels = {"image_noise": (0, 2 * IMAGE_NOISE), "audio_snr_db": (AUDIO_SNR_DB - 12, AUDIO_SNR_DB + 12)}
train = av_digits(**levels, repeats=3).train
test = av_digits().test
dims = {name: tokens.shape[-1] for name, tokens in train.inputs.items()}

fusion = MultimodalTransformer(dims, 32, num_heads=4, num_layers=2, max_lengths={"image": 8, "audio": 40})
head = nn.Linear(32, 10)
drop = ModalityDropout(0.3)  # now and then a sample loses its image or its sound
parameters = [*fusion.parameters(), *head.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=6e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * -(-len(train) // 64))

for epoch in range(epochs):
    for batch in train.batches(64, torch.Generator().manual_seed(epoch)):
        present = drop(torch.ones(len(batch), len(dims), dtype=torch.bool))
        logits = head(fusion(batch.inputs, batch.mask, present).fused)
        loss = nn.functional.cross_entropy(logits, batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.2f}")

fusion.eval()
with torch.no_grad():
    for names in (["image", "audio"], ["image"], ["audio"]):
        # A modality that is missing is simply not in the dict.
        inputs = {name: test.inputs[name] for name in names}
        out = fusion(inputs, {name: test.mask[name] for name in names if name in test.mask})
        accuracy = (head(out.fused).argmax(1) == test.label).float().mean()
        mass = zip(dims, out.source_mass.mean(0), strict=True)
        share = ", ".join(f"{name} {part:.0%}" for name, part in mass)
        print(f"{' + '.join(names):13}  accuracy {accuracy:.2f}   attention: {share}")
