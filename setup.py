import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"__version__ = '([^']+)'", (ROOT / 'dckd_sr' / '__init__.py').read_text(encoding='utf-8')).group(1)

# What a wheel carries of the clone's other folders, under dckd_sr/shipped: option files, and the demo's weights.
SHIPPED = ('options/**/*.yml', 'experiments/pretrained_models/demo/*')


class BuildWithShippedFiles(build_py):
    """An installed wheel has copies; a clone, also one installed with -e, uses its own folders."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        for file in sorted(file for pattern in SHIPPED for file in ROOT.glob(pattern)):
            target = Path(self.build_lib) / 'dckd_sr' / 'shipped' / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(
    name='dckd_sr',
    version=VERSION,
    description='Dynamic contrastive knowledge distillation for image restoration, as an extension of BasicSR',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['dckd_sr', 'dckd_sr.*']),
    package_data={'dckd_sr': ['report.html', 'fake_gpu.cpp']},
    # BasicSR 1.4.2 cannot be built on Python 3.13 (its setup.py reads locals() after exec).
    python_requires='>=3.9,<3.13',
    install_requires=[
        'basicsr==1.4.2',
        'torch>=2.4',
        'torchvision>=0.19',
        'numpy>=1.24',
        'opencv-python>=4.8',
        'lmdb>=1.4',
        'pillow>=9.1',
        'pydantic>=2.5',
        'PyYAML>=6.0',
        'safetensors>=0.4.3',
        'scikit-image>=0.22',
        'scipy>=1.10',
        'spandrel>=0.4.1',
        'tifffile>=2022.8.12',
        'tqdm>=4.64',
    ],
    extras_require={
        'test': ['pytest>=7.4', 'pytest-xdist>=3.5', 'hypothesis>=6.80', 'kornia>=0.7.2', 'fastjsonschema>=2.19'],
        'lint': ['ruff>=0.6'],
        'report': ['jinja2>=3.0', 'matplotlib>=3.7'],
        'heif': ['pillow-heif>=0.16'],
        'onnx': ['onnx>=1.19', 'onnxruntime>=1.19', 'onnxscript>=0.3'],
    },
    cmdclass={'build_py': BuildWithShippedFiles},
    entry_points={
        'console_scripts': [
            'dckd-train = dckd_sr.train:main',
            'dckd-test = dckd_sr.test:main',
            'dckd-doctor = dckd_sr.doctor:main',
        ],
    },
)
