"""A watcher that remembers what a command has said."""

from vitcli.progress import Quiet, QuietBar


class Told(Quiet):
    """A watcher that keeps notes, warnings, and of every bar its label, total, start and end.

    `lines` holds notes and warnings together, in their order.
    """

    def __init__(self):
        self.notes, self.warnings, self.lines, self.bars = [], [], [], []

    def warn(self, message):
        self.warnings.append(message)
        self.lines.append(message)

    def note(self, message):
        self.notes.append(message)
        self.lines.append(message)

    def progress(self, label, total=None, done=0):
        self.bars.append([label, total, done, done])
        told = self.bars[-1]

        class Bar(QuietBar):
            def advance(self, n=1, **figures):
                told[3] += n

            def extend(self, total):
                told[1] = total

        return Bar()
