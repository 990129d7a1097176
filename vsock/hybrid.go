package vsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// maxReply is the room for the hypervisor's answer with its newline; "OK 4294967295\n" is the longest that makes sense.
const maxReply = 32

// hyperKitGuest is the CID that HyperKit gives its machine.
const hyperKitGuest = 3

// dialHybrid calls the guest through Firecracker's socket, which Cloud Hypervisor and vhost-device-vsock have as well.
// See docs/vsock.md of Firecracker.
func dialHybrid(ctx context.Context, a Addr) (net.Conn, error) {
	conn, err := dialUnix(ctx, a.file(a.path))
	if err != nil {
		return nil, err
	}
	err = within(ctx, conn, func() error {
		if _, err := fmt.Fprintf(conn, "CONNECT %d\n", a.port); err != nil {
			return err
		}
		return readReply(conn)
	})
	if err != nil {
		conn.Close()
		return nil, hungUp(err)
	}
	return conn, nil
}

// hungUp translates the way in which hypervisors say no: they close the connection.
func hungUp(err error) error {
	if err == io.EOF || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("the hypervisor hung up: %w", syscall.ECONNREFUSED)
	}
	return err
}

// within runs a handshake on conn and ends it with ctx.
func within(ctx context.Context, conn net.Conn, handshake func() error) error {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err := handshake()
	if !stop() {
		return context.Cause(ctx)
	}
	return err
}

// readReply reads the line "OK PORT\n", PORT being what the host's end has got, byte by byte: behind it begins what the guest says.
// It returns io.EOF if there was nothing.
func readReply(r io.Reader) error {
	line := make([]byte, 0, maxReply)
	for {
		next := line[len(line) : len(line)+1]
		_, err := io.ReadFull(r, next)
		if err == io.EOF && len(line) > 0 {
			return fmt.Errorf("the hypervisor's reply ends after %q: %w", line, io.ErrUnexpectedEOF)
		}
		if err != nil {
			return err
		}
		if next[0] == '\n' {
			break
		}
		line = line[:len(line)+1]
		if len(line) == maxReply {
			return fmt.Errorf("the hypervisor's reply %q… has no end", line)
		}
	}
	port, ok := strings.CutPrefix(string(line), "OK ")
	if ok {
		_, err := strconv.ParseUint(port, 10, 32)
		ok = err == nil
	}
	if !ok {
		return fmt.Errorf("the hypervisor replies %q, want OK and a port", line)
	}
	return nil
}

// hybridCalls is where the guest's calls arrive.
func hybridCalls(a Addr) string { return fmt.Sprintf("%s_%d", a.file(a.path), a.port) }

func listenHybrid(a Addr) (net.Listener, error) { return listenUnix(hybridCalls(a)) }

// dialHyperKit names the guest's port by one line, which HyperKit does not answer: a port without a listener
// shows when the connection ends.
func dialHyperKit(ctx context.Context, a Addr) (net.Conn, error) {
	conn, err := dialUnix(ctx, path.Join(a.file(a.path), "connect"))
	if err != nil {
		return nil, err
	}
	err = within(ctx, conn, func() error {
		_, err := fmt.Fprintf(conn, "%08x.%08x\n", hyperKitGuest, a.port)
		return err
	})
	if err != nil {
		conn.Close()
		return nil, hungUp(err)
	}
	return conn, nil
}

func hyperKitCalls(a Addr) string {
	return path.Join(a.file(a.path), fmt.Sprintf("%08x.%08x", cidHost, a.port))
}

func listenHyperKit(a Addr) (net.Listener, error) { return listenUnix(hyperKitCalls(a)) }
