// Package dump repeats netlink dumps that the kernel could not give whole.
package dump

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// tries bounds how often a dump is repeated; on a host where links come and go all the time the last one has to do.
const tries = 10

// Whole calls list until its answer is consistent: the kernel marks a dump during which the listed things changed
// (NLM_F_DUMP_INTR), and parts may then be missing from it.
func Whole[T any](list func() (T, error)) (T, error) {
	for try := 1; ; try++ {
		got, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return got, err
		}
		if try == tries {
			return got, nil
		}
	}
}
