"""How probable it is that a path is wrong about a sample: targets for predictors.

Nobody knows that probability of a single sample. So samples of which a path says about the same
are put together, by K-means on its probability vectors of the validation data, and all of a cluster
get the error rate of its validation samples.

Reference:
    Regol et al., QuEE, 2024, section 4.1, Eq. 10-12; appendices 7.1.4 and 7.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.quee.table import PathTable
from edge_runtime.errors import CalibrationError, ConfigError, missing_package

#: Validation samples per cluster, below which an error rate says nothing; the paper has 8 and more.
LEAST_PER_CLUSTER = 4
#: Random starts, of which the best counts.
_STARTS = 10
_BINS = 15
#: Samples at a time.
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of one path.

    Attributes:
        centres: Shape (K, classes), float64.
        errors: Share of each cluster's validation samples that the path is wrong about, shape
            (K,), float32.
    """

    centres: NDArray[np.float64]
    errors: NDArray[np.float32]

    def assign(self, probabilities: NDArray[np.floating]) -> NDArray[np.int64]:
        """The nearest cluster of each sample, shape (n,), int64; the first of equals.

        Args:
            probabilities: Shape (n, classes).
        """
        found = [
            _nearest(probabilities[i : i + _BLOCK], self.centres) for i in _blocks(probabilities)
        ]
        return np.concatenate(found)


def find_clusters(validation: PathTable, clusters: int, *, seed: int = 0) -> tuple[Clusters, ...]:
    """Cluster what each path says of the validation data.

    Args:
        validation: The table.
        clusters: K, >= 1. A path that says fewer different things gets a cluster for each.
        seed: Of the random starts.

    Returns:
        One entry per path.

    Raises:
        CalibrationError: There are fewer than 4 K samples.
        ConfigError: `clusters` < 1.
        BackendUnavailable: scikit-learn is not installed.
    """
    if clusters < 1:
        raise ConfigError("clusters", got=clusters, expected=">= 1")
    if len(validation) < LEAST_PER_CLUSTER * clusters:
        raise CalibrationError(
            f"too few validation samples for {clusters} clusters",
            got=len(validation),
            expected=f">= {LEAST_PER_CLUSTER * clusters}, {LEAST_PER_CLUSTER} per cluster",
            remedy="Give more validation data, or fewer clusters",
        )
    return tuple(
        _path_clusters(
            validation.probabilities[:, i].astype(np.float64),
            ~validation.right[:, i],
            clusters,
            seed,
        )
        for i in range(len(validation.paths))
    )


def targets(clusters: Sequence[Clusters], table: PathTable) -> NDArray[np.float32]:
    """The error rate of the cluster that each sample falls into, on each path.

    Args:
        clusters: From `find_clusters`, of the same paths.
        table: Any samples.

    Returns:
        Shape (N, P), float32, in [0, 1].
    """
    columns = [
        path.errors[path.assign(table.probabilities[:, i])] for i, path in enumerate(clusters)
    ]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class TargetError:
    """How far the targets of K clusters are off.

    Attributes:
        clusters: K.
        error: Expected calibration error, mean over the paths, in [0, 1].
        paths: That of each path.
    """

    clusters: int
    error: float
    paths: tuple[float, ...]


def calibration_error(
    validation: PathTable, test: PathTable, clusters: int, *, seed: int = 0
) -> TargetError:
    """Expected calibration error of the targets on data they were not made from.

    Of each path, 1 minus the target of every test sample is sorted and cut into 15 bins of equally
    many samples (as the appendix says; samples of one cluster stay in the order of the table).
    The error is the mean over the bins, weighted by their samples, of the distance between mean
    target and accuracy.

    Args:
        validation: What targets are made from.
        test: Other samples, of the same paths.
        clusters: K.
        seed: Of the random starts.

    Raises:
        CalibrationError: As for `find_clusters`, or fewer than 15 test samples.
        ConfigError: The tables have different paths, or `clusters` < 1.

    Reference:
        QuEE, appendix 7.2.
    """
    if len(test) < _BINS:
        raise CalibrationError("samples for 15 bins", got=len(test), expected=f">= {_BINS}")
    same = test.of(validation.paths)
    said = 1 - targets(find_clusters(validation, clusters, seed=seed), same).astype(np.float64)
    errors = tuple(_ece(said[:, i], same.right[:, i]) for i in range(len(same.paths)))
    return TargetError(clusters, float(np.mean(errors)), errors)


def _ece(said: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    order = np.argsort(said, kind="stable")
    return sum(
        len(rows) / len(said) * abs(float(right[rows].mean() - said[rows].mean()))
        for rows in np.array_split(order, _BINS)
    )


def _path_clusters(
    points: NDArray[np.float64], wrong: NDArray[np.bool_], clusters: int, seed: int
) -> Clusters:
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package("scikit-learn", "calib") from error
    different = np.unique(points, axis=0)
    if len(different) <= clusters:
        centres = different
    else:
        means = KMeans(clusters, init="random", n_init=_STARTS, random_state=seed)
        # With several threads the sums, and so the clusters, depend on which is done first.
        with threadpool_limits(limits=1):
            centres = means.fit(points).cluster_centers_
    members = Clusters(centres, np.zeros(len(centres), np.float32)).assign(points)
    count = np.bincount(members, minlength=len(centres))
    errors = np.bincount(members, weights=wrong, minlength=len(centres))
    kept = count > 0
    return Clusters(centres[kept], (errors[kept] / count[kept]).astype(np.float32))


def _blocks(points: NDArray[np.floating]) -> range:
    return range(0, len(points), _BLOCK)


def _nearest(points: NDArray[np.floating], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    # The squared length of a point is the same for all centres.
    distances = np.square(centres).sum(axis=1) - 2 * points.astype(np.float64) @ centres.T
    nearest: NDArray[np.int64] = distances.argmin(axis=1)
    return nearest
