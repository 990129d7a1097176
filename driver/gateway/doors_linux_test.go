package gateway

import (
	"bytes"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

// everyDoor opens all ways to the gateway, in a directory.
func everyDoor(t testing.TB) func(c *Config, dir string) {
	return func(c *Config, dir string) {
		c.Listen = []vsock.Addr{parse(t, "unix://"+dir+"/api")}
		c.Machines = []vsock.Addr{parse(t, "hybrid://"+dir+"/vm:1024")}
		c.Services = []vsock.Addr{parse(t, "unix://"+dir+"/services")}
		h := &c.Hypervisors
		h.VPNKit = []vsock.Addr{parse(t, "unix://"+dir+"/vpnkit")}
		h.QEMU = []vsock.Addr{parse(t, "unix://"+dir+"/qemu")}
		h.Packets = []string{dir + "/bess"}
		h.Datagrams = []string{dir + "/vfkit"}
		c.PIDFile = dir + "/pid"
	}
}

// By every door a machine gets an answer, again when it comes again, and it is notified.
func TestDoors(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	r := start(t, everyDoor(t))
	for _, door := range []struct {
		name string
		link func(t *testing.T) *l2.Link
	}{
		{"qemu", func(t *testing.T) *l2.Link {
			return l2.Stream(dialUnix(t, "unix", r.dir+"/qemu", ""), l2.Options{Framing: l2.QEMU})
		}},
		{"bess", func(t *testing.T) *l2.Link {
			link, err := l2.Packets(dialUnix(t, "unixpacket", r.dir+"/bess", ""), l2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return link
		}},
		{"vfkit", func(t *testing.T) *l2.Link {
			link, err := l2.Packets(dialUnix(t, "unixgram", r.dir+"/vfkit", t.TempDir()+"/vm"), l2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return link
		}},
		{"vpnkit", func(t *testing.T) *l2.Link {
			conn := dialUnix(t, "unix", r.dir+"/vpnkit", "")
			vpnkitHandshake(t, conn)
			return l2.Stream(conn, l2.Options{Framing: l2.HyperKit})
		}},
		{"connect", func(t *testing.T) *l2.Link {
			conn := dialUnix(t, "unix", r.dir+"/api", "")
			request(t, conn, "/connect")
			return l2.Stream(conn, l2.Options{Framing: l2.HyperKit})
		}},
		{"connect usernet", func(t *testing.T) *l2.Link {
			conn := dialUnix(t, "unix", r.dir+"/api", "")
			opts, err := l2.Negotiate(conn, "/connect", l2.AllOffload)
			if err != nil || opts.Framing != l2.Usernet {
				t.Fatalf("framing %v, %v", opts.Framing, err)
			}
			return l2.Stream(conn, opts)
		}},
		{"hybrid vsock", func(t *testing.T) *l2.Link {
			conn := dialUnix(t, "unix", r.dir+"/vm_1024", "")
			opts, err := l2.Negotiate(conn, "/connect", l2.AllOffload)
			if err != nil || opts.Framing != l2.Usernet {
				t.Fatalf("framing %v, %v", opts.Framing, err)
			}
			return l2.Stream(conn, opts)
		}},
		{"hybrid vsock, gvforwarder", func(t *testing.T) *l2.Link {
			conn := dialUnix(t, "unix", r.dir+"/vm_1024", "")
			request(t, conn, "/connect")
			return l2.Stream(conn, l2.Options{Framing: l2.HyperKit})
		}},
	} {
		t.Run(door.name, func(t *testing.T) {
			for range 2 {
				link := door.link(t)
				meet(t, link)
				if event, mac := r.next(); event != "connection_established" || mac != machineMAC.String() {
					t.Errorf("event %s of %s", event, mac)
				}
				if cam := r.CAM(); len(cam) != 1 {
					t.Errorf("table %v", cam)
				}
				if err := link.Close(); err != nil {
					t.Error(err)
				}
				if event, mac := r.next(); event != "connection_closed" || mac != machineMAC.String() {
					t.Errorf("event %s of %s", event, mac)
				}
			}
		})
	}
	if s := r.Stats(); s.BytesReceived < 16*42 || s.BytesSent < 16*42 {
		t.Errorf("%d bytes received, %d sent", s.BytesReceived, s.BytesSent)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	files, err := os.ReadDir(r.dir)
	if err != nil || len(files) != 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

// Two machines by different doors reach each other, and one that does not read holds up nobody.
func TestMachinesMeet(t *testing.T) {
	r := start(t, everyDoor(t))
	stuck := dialUnix(t, "unix", r.dir+"/qemu", "")
	first := l2.Stream(stuck, l2.Options{Framing: l2.QEMU})
	meet(t, first)
	conn := dialUnix(t, "unix", r.dir+"/qemu", "")
	second := l2.Stream(conn, l2.Options{Framing: l2.QEMU})
	other := l2.MAC{2, 0, 0, 0, 0, 2}
	to := append(append([]byte{}, machineMAC[:]...), other[:]...)
	if _, err := second.Send([]l2.Frame{{Head: append(to, bytes.Repeat([]byte("usernet "), 8)...)}}); err != nil {
		t.Fatal(err)
	}
	frames, err := first.Receive()
	if err != nil || len(frames) != 1 || !bytes.Contains(frames[0].Head, []byte("usernet usernet")) {
		t.Errorf("the first machine has got %v, %v", frames, err)
	}
}
