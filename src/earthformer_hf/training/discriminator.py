"""The patch discriminator that PreDiff's autoencoder is trained against, and the losses of both.

Isola et al., "Image-to-image translation with conditional adversarial networks", CVPR 2017, section 3.2.2, as Esser et
al. use it in "Taming transformers for high-resolution image synthesis", CVPR 2021, section 3.1.
"""

import torch
from torch import nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Module):
    """Judges each patch of about 70 x 70 pixels: a high number where the picture looks real.

    Args:
        in_channels: of the pictures.
        channels: of the first layer; they double up to eightfold.
        num_layers: with stride 2.
    """

    def __init__(self, in_channels: int = 1, channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [channels * min(2**n, 8) for n in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for n in range(num_layers):
            stride = 2 if n < num_layers - 1 else 1
            layers += [nn.Conv2d(widths[n], widths[n + 1], 4, stride, 1, bias=False), nn.BatchNorm2d(widths[n + 1])]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, *pictures: torch.Tensor) -> list[torch.Tensor]:
        """Batches (B, C, H, W), each normalised by itself -> (B, 1, H / 8 - 2, W / 8 - 2) each."""
        return [self.layers(batch) for batch in pictures]


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """What the discriminator minimises: real patches above 1, reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """The factor that makes both losses move the decoder's last layer by as much.

    |gradient of the reconstruction's loss| / (|gradient of the generator's loss| + 1e-4), at most 1e4; Esser et al.,
    equation 7. Both graphs are kept.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_generator.norm() + 1e-4)).clamp(0, 1e4).detach()


__all__ = ["PatchDiscriminator", "adaptive_weight", "hinge_loss"]
