package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
)

// TestSilentGateway has a gateway that hears nothing and says nothing, and whose stream stands. The agent leaves it, for one that hears.
func TestSilentGateway(t *testing.T) {
	noLeaks(t)
	h := newHost(t)
	h.serve()
	h.dhcp()
	cfg := h.config()
	cfg.Wait, cfg.lookEvery = 10*time.Millisecond, 20*time.Millisecond
	r := run(t, cfg)
	r.await()
	<-h.up
	guest, peer := h.connection()
	// Its card is down: what is written to it is lost.
	nettest.Handle(t, h.ns, func(k *netlink.Handle) error { return k.LinkSetDown(h.tap.link) })
	if _, err := io.WriteString(guest, "hello"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case <-h.up:
		case <-time.After(eventually):
			t.Fatal("the agent stays with a gateway that says nothing")
		}
	}
	nettest.Handle(t, h.ns, func(k *netlink.Handle) error { return k.LinkSetUp(h.tap.link) })
	var buf [5]byte
	peer.SetDeadline(time.Now().Add(eventually))
	if _, err := io.ReadFull(peer, buf[:]); err != nil || string(buf[:]) != "hello" {
		t.Errorf("got %q, %v", buf, err)
	}
}

// TestAskGateway: the gateway answers.
func TestAskGateway(t *testing.T) {
	noLeaks(t)
	h := newHost(t)
	h.serve()
	h.dhcp()
	r := run(t, h.config())
	r.await()
	iface, err := net.InterfaceByName("tap0")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := packet.Listen(iface, packet.Datagram, unix.ETH_P_ARP, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(eventually))
	link, err := netlink.LinkByName("tap0")
	if err != nil {
		t.Fatal(err)
	}
	if err := askGateway(link); err != nil {
		t.Fatal(err)
	}
	want := append([]byte{0, 2}, h.tap.mac[:]...) // an answer, by the gateway
	want = append(want, gatewayIP.AsSlice()...)
	for b := make([]byte, 64); ; {
		n, _, err := conn.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		if n >= 28 && bytes.Equal(b[6:18], want) {
			break
		}
	}
	if err := askGateway(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: 1}}); !errors.Is(err, errNobody) {
		t.Errorf("where there is no router: %v", err)
	}
}

func TestWatch(t *testing.T) {
	const every = time.Millisecond
	for _, c := range []struct {
		name        string
		sends       bool
		askable     bool
		answers     bool
		least, most int // questions
		ends        bool
	}{
		{"it answers", true, true, true, 10, 1 << 30, false},
		{"it does not answer", true, true, false, maxUnheard, maxUnheard, true},
		{"nothing is sent", false, true, false, maxUnheard, maxUnheard, true},
		{"there is nobody to ask", true, false, false, 10, 1 << 30, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var passed traffic
			ctx, cancel := context.WithTimeout(context.Background(), eventually)
			defer cancel()
			asked := 0
			err := passed.watch(ctx, every, func() error {
				if asked++; asked == 10 && !c.ends {
					cancel()
				}
				if !c.askable {
					return errNobody
				}
				if c.answers {
					passed.heard.Add(1)
				}
				if c.sends {
					passed.sent.Add(2)
				}
				return nil
			})
			if c.ends == errors.Is(err, context.Canceled) || asked < c.least || asked > c.most {
				t.Errorf("%v after %d questions", err, asked)
			}
		})
	}
}

func TestARPRequest(t *testing.T) {
	got := arpRequest(guestMAC[:], guestIP, gatewayIP)
	want := []byte{
		0, 1, 8, 0, 6, 4, 0, 1, 0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee, 192, 168, 127, 2, 0, 0, 0, 0, 0, 0, 192, 168, 127, 1,
	}
	if !bytes.Equal(got, want) {
		t.Errorf("% x", got)
	}
	if own := netip.AddrFrom4([4]byte(got[14:])); own != guestIP {
		t.Errorf("it is from %s", own)
	}
}
