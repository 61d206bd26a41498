"""stub"""


def gradients(how, interpret, saved, dy):
    raise NotImplementedError
