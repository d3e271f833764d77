"""The loop that a weblog post fine-tunes CLIP with: a Dataset over LMDB and Pillow, each caption tokenised when it is read, Adam,
features as they are, image to text only. Prints the seconds of every step as JSON."""

import argparse
import contextlib
import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import lmdb
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pairs(Dataset[Any]):
    """(pixels, tokens) of each row of the CSV."""

    def __init__(self, csv: Path, images: Path, preprocess: Any, tokenizer: Any) -> None:
        rows = pd.read_csv(csv, sep="|")
        self._keys, self._captions = rows["path"].tolist(), rows["tags"].tolist()
        self._environment = lmdb.open(str(images), readonly=True, lock=False)
        self._preprocess, self._tokenizer = preprocess, tokenizer

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self._environment.begin() as transaction:
            image = Image.open(io.BytesIO(transaction.get(self._keys[index].encode())))
        return self._preprocess(image), self._tokenizer([self._captions[index]])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--lmdb", type=Path, required=True)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--seed", type=int, help="of the order [default: another one each time]")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="model and weights for open_clip, instead of --model")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trained weights here")
    args = parser.parse_args()
    if args.seed is not None:
        torch.manual_seed(args.seed)
    name = f"local-dir:{args.pretrained}" if args.pretrained else args.model
    model, _, preprocess = open_clip.create_model_and_transforms(name, device=args.device)
    pairs = Pairs(args.csv, args.lmdb, preprocess, open_clip.get_tokenizer(name))
    loader = DataLoader(pairs, batch_size=args.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    autocast = torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else contextlib.nullcontext()
    model.train()
    seconds, began = [], time.monotonic()
    for images, tokens in itertools.chain.from_iterable(loader for _ in range(args.epochs)):
        optimizer.zero_grad()
        with autocast:
            image_features = model.encode_image(images.to(args.device))
            text_features = model.encode_text(tokens.to(args.device))
            logits = image_features @ text_features.T
            loss = F.cross_entropy(logits, torch.arange(len(logits), device=args.device))
        loss.backward()
        optimizer.step()
        loss.item()  # the post prints it
        seconds.append(time.monotonic() - began)
        began = time.monotonic()
    if args.save:
        torch.save(model.state_dict(), args.save)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
