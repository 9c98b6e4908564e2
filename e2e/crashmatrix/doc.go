// Package crashmatrix kills spherelet at every failpoint, on real VMs, and
// looks at what the next start makes of it. It is tests only:
//
//	make crash-matrix                                 all points, into docs/crash-matrix.md
//	go test ./e2e/crashmatrix -run TestCrashMatrix    one point an operation
//
// A cell of the matrix is a point and an operation that meets it. The daemon
// (`spherelet cri`, built with the tag failpoints) is started with the point
// armed, the operation is asked for, and the daemon must die of it. Then it is
// started without, and must within a while have nothing left on the host that
// no record knows, tell the truth about every pod, and do the operation when
// it is asked for again. All the time a neighbour runs, which must not notice:
// the same QEMU, Ready whenever somebody asks, a log without a gap or a
// repetition.
//
// Operations are done in the order of a pod's life, each round with one pod
// and one crash in each of them, so that a cell costs one boot at most.
package crashmatrix
