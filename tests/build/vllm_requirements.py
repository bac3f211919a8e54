"""What a vLLM wheel requires, a line each, without the torch packages: theirs are builds for devices that are not here."""

import re
import sys
import zipfile

TORCH = {"torch", "torchaudio", "torchvision", "torchcodec"}
PINNED = ["transformers<5.20"]  # later ones have moved what vLLM 0.32 imports

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
for line in lines:
    name, _, requirement = line.partition(":")
    if name == "Requires-Dist" and "extra ==" not in requirement:
        package = re.split(r"[^A-Za-z0-9_.-]", requirement.strip())[0].lower()
        if package not in TORCH:
            print(requirement.strip())
print(*PINNED, sep="\n")
