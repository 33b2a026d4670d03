"""StyleGAN2's layers the plain way: zeros inserted and filtered, one pass over the features for each of bias, activation, gain and clamp,
a grouped convolution with a weight for each sample where no gradient is needed. `plain()` puts these forwards in place of the package's."""
import contextlib
import math

import torch
import torch.nn.functional as F

from hyperface.stylegan2 import networks as nets

GAIN = {"linear": 1.0, "lrelu": math.sqrt(2), "relu": math.sqrt(2)}


def upfirdn2d(x, f, up=1, down=1, pad=(0, 0, 0, 0), gain=1.0):
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h, up, w, up)
    z[:, :, :, 0, :, 0] = x
    z = F.pad(z.reshape(n, c, h * up, w * up), pad)
    kernel = (f * gain).flip([0, 1]).to(x.dtype).expand(c, 1, *f.shape)
    return F.conv2d(z, kernel, groups=c)[:, :, ::down, ::down]


def upsample2d(x, f):
    return upfirdn2d(x, f, up=2, pad=(2, 1, 2, 1), gain=4.0)


def downsample2d(x, f):
    return upfirdn2d(x, f, down=2, pad=(1, 1, 1, 1))


def bias_act(x, b, act, gain, clamp):
    if b is not None:
        x = x + b.reshape(1, -1, *[1] * (x.ndim - 2))
    if act == "lrelu":
        x = F.leaky_relu(x, 0.2)
    elif act == "relu":
        x = F.relu(x)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def resampling_conv(x, w, f, up=1, down=1, groups=1):
    "w correlates at one size and going down; going up it convolves, as the published layers do."
    x, k = x.contiguous(), w.shape[-1]
    if up == 2 and k == 1:
        return upfirdn2d(F.conv2d(x, w, groups=groups), f, up=2, pad=(2, 1, 2, 1), gain=4.0)
    if up == 2:
        t = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2).reshape(-1, w.shape[0] // groups, k, k)
        return upfirdn2d(F.conv_transpose2d(x, t, stride=2, groups=groups), f, pad=(1, 1, 1, 1), gain=4.0)
    if down == 2 and k == 1:
        return F.conv2d(upfirdn2d(x, f, down=2, pad=(1, 1, 1, 1)), w, groups=groups)
    if down == 2:
        return F.conv2d(upfirdn2d(x, f, pad=(2, 2, 2, 2)), w, stride=2, groups=groups)
    return F.conv2d(x, w, padding=k // 2, groups=groups)


def modulated(x, w, styles, f, up, demodulate, noise, training):
    n, (cout, cin, k, _) = len(x), w.shape
    own = w[None] * styles[:, None, :, None, None]  # (n, cout, cin, k, k)
    d = (own.square().sum([2, 3, 4]) + 1e-8).rsqrt() if demodulate else None
    if not training:
        own = own * d[:, :, None, None, None] if demodulate else own
        y = resampling_conv(x.reshape(1, n * cin, *x.shape[2:]), own.reshape(n * cout, cin, k, k), f, up=up, groups=n)
        y = y.reshape(n, cout, *y.shape[2:])
    else:
        y = resampling_conv(x * styles[:, :, None, None], w, f, up=up)
        y = y * d[:, :, None, None] if demodulate else y
    return y if noise is None else y + noise


def linear(self, x):
    return bias_act(x @ (self.weight * self.weight_gain).T, None if self.bias is None else self.bias * self.bias_gain, self.activation, GAIN[self.activation], None)


def conv(self, x, gain=1):
    y = resampling_conv(x, self.weight * self.weight_gain, self.resample_filter, self.up, self.down)
    return bias_act(y, self.bias, self.activation, self.act_gain * gain, None if self.conv_clamp is None else self.conv_clamp * gain)


def synthesis(self, x, w, noise_mode="random", fused_modconv=None, gain=1, generator=None):
    noise = self.noise(x, noise_mode, generator)
    y = modulated(x, self.weight, self.affine(w), self.resample_filter, self.up, True, noise, self.training)
    return bias_act(y, self.bias, self.activation, self.act_gain * gain, None if self.conv_clamp is None else self.conv_clamp * gain)


def torgb(self, x, w, fused_modconv=None):
    y = modulated(x, self.weight, self.affine(w) * self.weight_gain, None, 1, False, None, self.training)
    return bias_act(y, self.bias, "linear", 1.0, self.conv_clamp)


@contextlib.contextmanager
def plain():
    "The package's networks with plain layers, in this block."
    new = {(nets.FullyConnectedLayer, "forward"): linear, (nets.Conv2dLayer, "forward"): conv, (nets.SynthesisLayer, "forward"): synthesis,
           (nets.ToRGBLayer, "forward"): torgb, (nets, "upsample2d"): upsample2d, (nets, "downsample2d"): downsample2d}
    old = {key: getattr(*key) for key in new}
    try:
        for key, value in new.items():
            setattr(*key, value)
        yield
    finally:
        for key, value in old.items():
            setattr(*key, value)
