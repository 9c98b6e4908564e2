// Package failpoint names the instants at which a test ends this process, or
// makes it fail or wait: before and after each act that outlives the process.
//
// In a build without the tag "failpoints" Hit and Err are empty and inlined
// away. With the tag, the environment variable ATOLL_FAILPOINT chooses:
//
//	ATOLL_FAILPOINT='cri/run/launched=kill'           SIGKILL at the first hit
//	ATOLL_FAILPOINT='tap/attach/made@3=kill'          at the third
//	ATOLL_FAILPOINT='cri/reclaim/begun=error*2'       the first two hits fail
//	ATOLL_FAILPOINT='cri/run/recorded=sleep(500ms)'   the first hit waits
//
// Several are separated by ';'. Whatever fires says so on standard error
// first. A name that does not exist, or an error asked of a point that can
// give none, ends the process with status 3: a test that hits nothing must
// not pass. See docs/decisions/0007-failpoints.md and docs/crash-matrix.md.
package failpoint
