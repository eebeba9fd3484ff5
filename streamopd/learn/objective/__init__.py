"""How far the student is from the teacher, and what its method makes of that: pure functions on arrays.

    cells         both sides over one partition         facts       what is known of a token
    aim           what is aimed at                      route, shape, weight, correction: one file a primitive
    divergence    how far, and the coefficient of it    orders      all of them in turn: what each branch tells each token
    judge         the loss with its gradient
"""

from .cells import Cells, Target, partition
from .facts import Facts, Known, Look, Observed, Views
from .judge import Verdict, judge, overlap
from .orders import instruct

__all__ = ["Cells", "Facts", "Known", "Look", "Observed", "Target", "Verdict", "Views", "instruct", "judge", "overlap", "partition"]
