package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/driver"
)

// Rootless Podman can leave its user namespace for another one while a daemon is in the first: by podman system migrate,
// or when the process that keeps the namespace ends. The daemon could not enter the namespaces of the containers to
// come. So doors tell where they are, and a daemon from whom Podman has gone away makes room for the next.

const (
	callersNamespace = "Usernet-User-Namespace" // in requests: its inode number
	leavingProcess   = "Usernet-Leaving"        // in an answer with the status 421: the daemon's process ID
)

// errLeft says that the daemon is not in the caller's user namespace.
var errLeft = errors.New("the daemon is in a user namespace that Podman has left")

// Tied makes h refuse to put containers on networks for callers in another user namespace. If then nobody is on a network
// of d, it calls leave.
func Tied(h http.Handler, d *driver.Driver, leave func()) http.Handler {
	own := userNamespace()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		theirs := r.Header.Get(callersNamespace)
		if r.Method != http.MethodPost || theirs == "" || theirs == own {
			h.ServeHTTP(w, r)
			return
		}
		err := fmt.Errorf("%w, and containers still run in it: stop them", errLeft)
		if d.Idle() {
			err = errLeft
			w.Header().Set(leavingProcess, strconv.Itoa(os.Getpid()))
			defer leave()
		}
		http.Error(w, fmt.Sprintf(`{"error":%q}`, err), http.StatusMisdirectedRequest)
	})
}

// userNamespace is the inode number of the process's own; "" if it is not known.
func userNamespace() string {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &st); err != nil {
		return ""
	}
	return strconv.FormatUint(st.Ino, 10)
}

// leavingError is errLeft of a daemon that is ending.
type leavingError struct{ pid int }

func (e *leavingError) Error() string { return errLeft.Error() }
func (e *leavingError) Unwrap() error { return errLeft }

// wait waits for the daemon's end.
func (e *leavingError) wait(ctx context.Context) error {
	fd, err := unix.PidfdOpen(e.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", e.pid, err)
	}
	defer unix.Close(fd)
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(startTimeout.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return os.NewSyscallError("poll", err)
		case n == 0:
			return fmt.Errorf("%w, and does not end", errLeft)
		default:
			return nil
		}
	}
	return ctx.Err()
}
