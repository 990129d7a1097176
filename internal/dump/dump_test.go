package dump

import (
	"errors"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestWholeRepeatsAnInterruptedDump(t *testing.T) {
	calls := 0
	got, err := Whole(func() (int, error) {
		calls++
		if calls < 3 {
			return 0, netlink.ErrDumpInterrupted
		}
		return calls, nil
	})
	if got != 3 || err != nil {
		t.Errorf("got %d, %v, want the third answer", got, err)
	}
}

func TestWholeReturnsOtherErrorsAtOnce(t *testing.T) {
	calls := 0
	broken := errors.New("broken")
	if _, err := Whole(func() (int, error) { calls++; return 0, broken }); !errors.Is(err, broken) || calls != 1 {
		t.Errorf("error %v after %d calls, want the first one", err, calls)
	}
}

func TestWholeGivesUpRepeating(t *testing.T) {
	if got, err := Whole(func() (int, error) { return 7, netlink.ErrDumpInterrupted }); got != 7 || err != nil {
		t.Errorf("got %d, %v, want what the last try saw", got, err)
	}
}
