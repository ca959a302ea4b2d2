"""Quantities that guidance holds on to, apart from the pipeline."""

import torch

from earthformer_hf.data.nbody_mnist import n_body_energy


def test_the_energy_of_n_bodies_belongs_to_their_force_and_is_kept():
    torch.manual_seed(0)
    positions = (100 * torch.rand(2, 3, 2, dtype=torch.float64)).requires_grad_()
    velocities = torch.randn(2, 3, 2, dtype=torch.float64)

    def force(positions):
        pulls = torch.zeros_like(positions)
        for i in range(3):
            for j in range(3):
                difference = positions[:, j] - positions[:, i]
                size = (difference.square().sum(-1, keepdim=True) + 100).sqrt()
                pulls[:, i] += 0.05 * difference / size
        return pulls

    energy = n_body_energy(positions, velocities)
    (slope,) = torch.autograd.grad(energy.sum(), positions)
    torch.testing.assert_close(-slope, force(positions))
    assert energy.shape == (2,)
    here, there = positions.detach(), velocities
    for _ in range(500):  # leapfrog
        there = there + 0.05 * force(here)
        here = here + 0.1 * there
        there = there + 0.05 * force(here)
    assert (here - positions).abs().mean() > 5
    torch.testing.assert_close(n_body_energy(here, there), energy.detach(), rtol=1e-5, atol=0)
