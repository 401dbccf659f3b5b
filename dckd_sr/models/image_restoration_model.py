"""The model types of NAFNet's and Restormer's option files.

With a teacher or another block of ours, such a file runs as `DCKDModel` (see `option_keys.DROP_IN_TYPES`).
"""

from basicsr.utils.registry import MODEL_REGISTRY

from dckd_sr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class ImageRestorationModel(KDModel):
    """NAFNet's model: gradients are clipped to norm 0.01 but for train.use_grad_clip: false or grad_clip.

    Source: megvii-research/NAFNet, basicsr/models/image_restoration_model.py.
    """

    def __init__(self, opt):
        opt.get('train', {}).setdefault('use_grad_clip', True)
        super().__init__(opt)


@MODEL_REGISTRY.register()
class ImageCleanModel(KDModel):
    """Restormer's model; ``train.mixing_augs`` is `KDModel`'s, as DCKDModel runs these files too.

    Source: swz30/Restormer, basicsr/models/image_restoration_model.py.
    """
