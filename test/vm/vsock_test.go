package vm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/vm/console"
	"github.com/usernet/usernet/vsock"
)

// vsocks: a call of the host through the machine's vsock, and the tests of the package, which need a kernel with vsock_loopback for what is
// about AF_VSOCK. (What else is in test/vm calls from the machine.)
func vsocks(r *rig) {
	r.modules("vmw_vsock_virtio_transport", "vsock_loopback")
	r.callMachine()
	ctx, cancel := context.WithTimeout(r.Context(), 2*patience)
	defer cancel()
	out, err := r.guest.Do(ctx, console.Command{Args: []string{"sh", "-c", "cd /tmp && vsock.test -test.v -test.timeout 3m 2>&1"}})
	if err != nil {
		r.Fatalf("%v\n%s", err, out)
	}
	for _, bad := range []string{"NOT TESTED", "--- SKIP"} {
		if strings.Contains(out, bad) {
			r.Errorf("%s:\n%s", bad, out)
		}
	}
	r.check(contains(out, "--- PASS: TestVsock ", "--- PASS: TestVsockSplice ", "--- PASS: TestActivation "))
}

// callMachine calls ports of the machine from the host, as a hypervisor's unix socket wants it.
func (r *rig) callMachine() {
	r.Helper()
	r.starts("echo", "guest", "echo", "vsock://:5000")
	r.wait("an echo of the machine", func() error {
		conn, err := r.dial(5000)
		if err != nil {
			return err
		}
		defer conn.Close()
		sent := make([]byte, 100_000)
		rand.Read(sent)
		failed := make(chan error, 1)
		go func() {
			_, err := conn.Write(sent)
			failed <- err
		}()
		got := make([]byte, len(sent))
		_, err = io.ReadFull(conn, got)
		if err == nil && !bytes.Equal(got, sent) {
			err = errors.New("what comes back is not what was sent")
		}
		conn.Close()
		return errors.Join(err, <-failed)
	})
	if conn, err := r.dial(5001); !errors.Is(err, syscall.ECONNREFUSED) {
		r.Errorf("dial a port that nobody listens on: %v, %v", conn, err)
	}
}

func (r *rig) dial(port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	a, err := vsock.Parse(fmt.Sprintf("hybrid://%s:%d", r.vsock(), port))
	if err != nil {
		return nil, err
	}
	conn, err := vsock.Dial(ctx, a)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(patience))
}
