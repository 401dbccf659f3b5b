"""Public weights: where they are, what they hash to, which network they are of.

Every address and hash was read on the page that stands beside it (2026-11). ``hash_page`` may be another's who measured
the file: it guards the transfer, it is no promise of the authors. Where no page states a hash, there is none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Weights of one network.

    Attributes:
        name: network, data, training patch (LQ pixels for super-resolution), scale or task.
        family: folder below experiments/pretrained_models.
        file: name of the file there.
        url, page: what is downloaded, and the page that states it.
        network: option block.
        scale: output size over input size.
        sha256, hash_page: hash or its first digits, and the page that states it.
        param_key: entry of the file with the weights, or None.
        member: path of the file in an archive, where ``url`` is one.
        letter: the network that it serves as: t, or vqgan.
        license: as far as the page or its repository states one.
        note: what else to know.
    """

    name: str
    family: str
    file: str
    url: str
    page: str
    network: dict
    scale: int
    sha256: str | None = None
    hash_page: str | None = None
    param_key: str | None = 'params'
    member: str | None = None
    letter: str = 't'
    license: str = ''
    note: str = ''


_GITHUB = 'https://github.com'
# The form of the address is that of the hash_page of NAFNet width 32; the ids are on the pages.
_DRIVE = 'https://drive.usercontent.google.com/download?id={}&export=download&confirm=t'
_BASICSR = f'{_GITHUB}/XPixelGroup/BasicSR/blob/master'
_SWINIR = f'{_GITHUB}/JingyunLiang/SwinIR'
_EDSR_IDS = {
    'EDSR_Mx2_f64b16_DIV2K_official-3ba7b086.pth': '1mREMGVDymId3NzIc2u90sl_X4-pb4ZcV',
    'EDSR_Mx3_f64b16_DIV2K_official-6908f88a.pth': '1EriqQqlIiRyPbrYGBbwr_FZzvb3iwqz5',
    'EDSR_Mx4_f64b16_DIV2K_official-0c287733.pth': '1bCK6cFYU01uJudLgUUe-jgx-tZ3ikOWn',
    'EDSR_Lx2_f256b32_DIV2K_official-be38e77d.pth': '15257lZCRZ0V6F9LzTyZFYbbPrqNjKyMU',
    'EDSR_Lx3_f256b32_DIV2K_official-3660f70d.pth': '18q_D434sLG_rAZeHGonAX8dkqjoyZ2su',
    'EDSR_Lx4_f256b32_DIV2K_official-76ee1c8f.pth': '1GCi30YYCzgMCcgheGWGusP9aWKOAy5vl',
}
_METALGROW = f'{_GITHUB}/joaodotwork/metalgrow/blob/c2e2d36ace60c64185aa16a99e82a277cfc79648/src/metalgrow/weights.py'
_CCRESTORATION = (
    f'{_GITHUB}/TensoRaws/ccrestoration/blob/002238ec05f3b167bfeace75331771712d042b0a'
    '/ccrestoration/config/swinir_config.py'
)
_SWINIR_HASHES = {
    '001_classicalSR_DIV2K_s48w8_SwinIR-M_x2.pth': (
        'ac6d4895f73aa1b3d563937e29dcedcfdff4d401280e248f23db3c6f68e8343b',
        _METALGROW,
    ),
    '001_classicalSR_DIV2K_s48w8_SwinIR-M_x4.pth': (
        '129dc773ba2d4c07f3eb0bb116fbe692011b7cc072d9ca12797cd3748198610a',
        _METALGROW,
    ),
    '001_classicalSR_DF2K_s64w8_SwinIR-M_x2.pth': (
        '2032ebf8f401dd3ce2fae5f3852117cb72101ec6ed8358faa64c2a3fa09ed4ac',
        _CCRESTORATION,
    ),
    '001_classicalSR_DF2K_s64w8_SwinIR-M_x4.pth': (
        '4e78e33f22c1aa8a773db0cf4a7381bae97c2362c717f155439ebc690cbd9215',
        f'{_GITHUB}/Ikshvaku-K/Upscaling_ESRGAN/blob/7a9e39e092354e7c5f98a544e0c14e788f1b0b8c/SECURITY_AND_BUGFIX_REPORT.md',
    ),
    '002_lightweightSR_DIV2K_s64w8_SwinIR-S_x2.pth': (
        '193b229909ca89cd8b55de9c9e7fce146ae759d59dfcd78d8feb9dd1d6fa0fd7',
        _CCRESTORATION,
    ),
    '002_lightweightSR_DIV2K_s64w8_SwinIR-S_x4.pth': (
        '09fad24e32ae62722e1a055efde9921328f4137981bab0a42a4a3a806306c58e',
        f'{_GITHUB}/dreinon/proyecto-tfg/blob/0671a1ae6d35f64f96676ca456a078d29ad5c2c7/src/score_super_resolution/pretrained.py',
    ),
}


def _edsr():
    for file, drive_id in _EDSR_IDS.items():
        size, scale = file[5], int(file[7])
        large = size == 'L'
        yield Entry(
            name=f'EDSR-{size}_DIV2K_s48_x{scale}',
            family='EDSR',
            file=file,
            url=_DRIVE.format(drive_id),
            page=f'{_BASICSR}/scripts/download_pretrained_models.py',
            sha256=file[-12:-4],  # publish_models.py there names files by the first digits of their sha256
            hash_page=f'{_BASICSR}/docs/ModelZoo.md',
            network={
                'type': 'EDSR',
                'num_in_ch': 3,
                'num_out_ch': 3,
                'num_feat': 256 if large else 64,
                'num_block': 32 if large else 16,
                'upscale': scale,
                'res_scale': 0.1 if large else 1,
                'img_range': 255.0,
                'rgb_mean': [0.4488, 0.4371, 0.4040],
            },
            scale=scale,
            license='Apache-2.0 (BasicSR)',
        )


def _rcan():
    for scale in (2, 3, 4):
        yield Entry(
            name=f'RCAN_DIV2K_s48_x{scale}',
            family='RCAN',
            file=f'RCAN_BIX{scale}.pt',
            url='https://www.dropbox.com/s/mjbcqkd4nwhr6nu/models_ECCV2018RCAN.zip?dl=1',
            page=f'{_GITHUB}/sanghyun-son/EDSR-PyTorch/blob/master/src/demo.sh',
            network={'type': 'spandrel'},  # the layout of its own code, which the reader renames
            scale=scale,
            param_key=None,
            member=f'models_ECCV2018RCAN/RCAN_BIX{scale}.pt',
            license='none stated',
            note='one archive holds all scales',
        )


def _swinir():
    kinds = [('M', 'DIV2K', 48, '001_classicalSR', scale) for scale in (2, 3, 4, 8)]
    kinds += [('M', 'DF2K', 64, '001_classicalSR', scale) for scale in (2, 3, 4, 8)]
    kinds += [('S', 'DIV2K', 64, '002_lightweightSR', scale) for scale in (2, 3, 4)]
    for size, data, patch, prefix, scale in kinds:
        file = f'{prefix}_{data}_s{patch}w8_SwinIR-{size}_x{scale}.pth'
        depth = 6 if size == 'M' else 4
        sha256, hash_page = _SWINIR_HASHES.get(file, (None, None))
        yield Entry(
            name=f'SwinIR-{size}_{data}_s{patch}w8_x{scale}',
            family='SwinIR',
            file=file,
            url=f'{_SWINIR}/releases/download/v0.0/{file}',
            page=f'{_SWINIR}/blob/main/main_test_swinir.py',
            sha256=sha256,
            hash_page=hash_page,
            network={
                'type': 'SwinIR',
                'upscale': scale,
                'in_chans': 3,
                'img_size': patch,
                'window_size': 8,
                'img_range': 1.0,
                'depths': [6] * depth,
                'embed_dim': 180 if size == 'M' else 60,
                'num_heads': [6] * depth,
                'mlp_ratio': 2,
                'upsampler': 'pixelshuffle' if size == 'M' else 'pixelshuffledirect',
                'resi_connection': '1conv',
            },
            scale=scale,
            license='Apache-2.0',
        )


def _nafnet():
    sources = {
        32: (
            '1Fr2QadtDCEXg6iwWX8OzeZLbHOx2t5Bj',
            '19394e6155d12ef6371d1d57496f87f0ec88f92bdffa27c0792690722d5d1a5c',
            f'{_GITHUB}/sheldonxxxx/RapidRAW/blob/5cf4740780c19d167df81f8b8de323b50805105d'
            '/bench/enhance/restoration_export.py',
        ),
        64: (
            '1S0PVRbyTakYY9a82kujgZLbMihfNBLfC',
            '329d3ab4077b8d6b7ff61de376e483714667960bf85be027bf4335cda701196f',
            f'{_GITHUB}/dmlsrc/LTX-2-MLX/blob/34e3d8ccba6613620815353fb29b649dde86f8d5'
            '/LTX_2_MLX/videotoolbox/nafnet/weights/README.md',
        ),
    }
    for width, (drive_id, sha256, hash_page) in sources.items():
        yield Entry(
            name=f'NAFNet_GoPro_s256_width{width}',
            family='NAFNet',
            file=f'NAFNet-GoPro-width{width}.pth',
            url=_DRIVE.format(drive_id),
            page=f'{_GITHUB}/megvii-research/NAFNet/blob/main/docs/GoPro.md',
            sha256=sha256,
            hash_page=hash_page,
            network={
                'type': 'NAFNet',
                'width': width,
                'enc_blk_nums': [1, 1, 1, 28],
                'middle_blk_num': 1,
                'dec_blk_nums': [1, 1, 1, 1],
            },
            scale=1,
            license='MIT',
        )


def _restormer():
    sources = {
        'Rain13K_s128-384_deraining': (
            'deraining.pth',
            '225ed9acf80b3527d7080e5182918f642a23a78ef8593ad700b7e924bd660681',
            f'{_GITHUB}/Bhupesh-Khordia/StormSight/blob/a01edcfe5d4aa48c11bd2dd5ce6e610bfe89b00c'
            '/scripts/download_models.sh',
        ),
        'GoPro_s128-384_deblurring': (
            'motion_deblurring.pth',
            '194e38fb5b607c9dc5a5b3e08e65b2e79ee2bf0ef5048e0612f6b2ff2f79da31',
            f'{_GITHUB}/KarimIbrahim11/Restormer-FT/blob/c32c11361a1c3c3d002b3e3cd260cc9f234248cf'
            '/Motion_Deblurring/pretrained_models/motion_deblurring.pth',
        ),
    }
    for name, (file, sha256, hash_page) in sources.items():
        yield Entry(
            name=f'Restormer_{name}',
            family='Restormer',
            file=file,
            url=f'{_GITHUB}/swz30/Restormer/releases/download/v1.0/{file}',
            page=f'{_GITHUB}/chaiNNer-org/spandrel/blob/main/tests/test_Restormer.py',
            sha256=sha256,
            hash_page=hash_page,
            network={
                'type': 'Restormer',
                'inp_channels': 3,
                'out_channels': 3,
                'dim': 48,
                'num_blocks': [4, 6, 6, 8],
                'num_refinement_blocks': 4,
                'heads': [1, 2, 4, 8],
                'ffn_expansion_factor': 2.66,
                'bias': False,
                'LayerNorm_type': 'WithBias',
                'dual_pixel_task': False,
            },
            scale=1,
            license=f'{_GITHUB}/swz30/Restormer/blob/main/LICENSE.md',
        )


def _vqgan():
    yield Entry(
        name='VQGAN_ImageNet_s256_f16_1024',
        family='VQGAN',
        file='vqgan_imagenet_f16_1024.ckpt',
        url='https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/files/?p=%2Fckpts%2Flast.ckpt&dl=1',
        page=f'{_GITHUB}/tnwei/vqgan-clip-app/blob/main/download-weights.sh',
        network={
            'type': 'VQGAN',
            'embed_dim': 256,
            'n_embed': 1024,
            'ddconfig': {
                'double_z': False,
                'z_channels': 256,
                'resolution': 256,
                'in_channels': 3,
                'out_ch': 3,
                'ch': 128,
                'ch_mult': [1, 1, 2, 2, 4],
                'num_res_blocks': 2,
                'attn_resolutions': [16],
                'dropout': 0.0,
            },
        },
        scale=1,
        param_key='state_dict',
        letter='vqgan',
        license=f'MIT ({_GITHUB}/CompVis/taming-transformers)',
        note='about 1 GB; distillation needs a part of it: python -m dckd_sr.zoo convert FILE --no-decoder',
    )


ENTRIES = {
    entry.name: entry for family in (_edsr(), _rcan(), _swinir(), _nafnet(), _restormer(), _vqgan()) for entry in family
}
