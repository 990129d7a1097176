package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// script is a server that answers as it is told, and notes what it was asked and when.
type script struct {
	began   time.Time
	acquire []error
	extend  []error
	said    []string
	done    context.CancelFunc // called when the script is at its end
}

func (s *script) note(format string, args ...any) {
	s.said = append(s.said, fmt.Sprintf("%v ", time.Since(s.began).Round(time.Second))+fmt.Sprintf(format, args...))
}

func (s *script) answer(list *[]error, n byte) (lease, error) {
	if len(*list) == 0 {
		s.done()
		return lease{}, context.Canceled
	}
	err := (*list)[0]
	*list = (*list)[1:]
	l := lease{began: time.Now(), renew: 30 * time.Minute, rebind: 52 * time.Minute, expires: time.Hour}
	l.addr = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200, 0, n}), 24)
	return l, err
}

type scripted struct{ *script }

func (s scripted) acquire(_ context.Context, was netip.Addr) (lease, error) {
	s.note("discover %v", was)
	return s.answer(&s.script.acquire, 2)
}

func (s scripted) extend(_ context.Context, l lease, anybody bool) (lease, error) {
	s.note("request %s, anybody %t", l.addr, anybody)
	return s.answer(&s.script.extend, 2)
}

func TestClient(t *testing.T) {
	silent := errors.New("no answer")
	for _, tt := range []struct {
		name            string
		acquire, extend []error
		want            []string
	}{
		{
			"renewed", []error{nil}, []error{nil, nil},
			[]string{
				"0s discover invalid IP", "0s set 10.200.0.2/24",
				"30m0s request 10.200.0.2/24, anybody false", "30m0s set 10.200.0.2/24",
				"1h0m0s request 10.200.0.2/24, anybody false", "1h0m0s set 10.200.0.2/24",
				"1h30m0s request 10.200.0.2/24, anybody false",
			},
		},
		{
			"nobody at first", []error{silent, silent, silent, nil}, nil,
			[]string{
				"0s discover invalid IP", "1s discover invalid IP", "3s discover invalid IP", "7s discover invalid IP", "7s set 10.200.0.2/24",
				"30m7s request 10.200.0.2/24, anybody false",
			},
		},
		{
			"refused", []error{nil, nil}, []error{errRefused},
			[]string{
				"0s discover invalid IP", "0s set 10.200.0.2/24",
				"30m0s request 10.200.0.2/24, anybody false", "30m0s set invalid Prefix",
				"30m1s discover 10.200.0.2", "30m1s set 10.200.0.2/24",
				"1h0m1s request 10.200.0.2/24, anybody false",
			},
		},
		{
			"expired", []error{nil}, []error{silent, silent, silent, silent, silent, silent, silent, silent, silent, silent},
			[]string{
				"0s discover invalid IP", "0s set 10.200.0.2/24",
				"30m0s request 10.200.0.2/24, anybody false",
				"41m0s request 10.200.0.2/24, anybody false",
				"46m30s request 10.200.0.2/24, anybody false",
				"49m15s request 10.200.0.2/24, anybody false",
				"50m38s request 10.200.0.2/24, anybody false",
				"51m38s request 10.200.0.2/24, anybody false",
				"52m0s request 10.200.0.2/24, anybody true",
				"56m0s request 10.200.0.2/24, anybody true",
				"58m0s request 10.200.0.2/24, anybody true",
				"59m0s request 10.200.0.2/24, anybody true",
				"1h0m0s set invalid Prefix",
				"1h0m1s discover 10.200.0.2",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				s := &script{began: time.Now(), acquire: tt.acquire, extend: tt.extend, done: cancel}
				c := client{server: scripted{s}, log: slog.New(slog.DiscardHandler), set: func(to settings) error {
					s.note("set %v", to.addr)
					return nil
				}}
				c.run(ctx)
				if d := cmp.Diff(tt.want, s.said); d != "" {
					t.Errorf("what happened (-want +got):\n%s", d)
				}
			})
		})
	}
}

// A lease whose settings cannot be made is asked for again, and its address is not taken for the machine's.
func TestClientCannotConfigure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s := &script{began: time.Now(), acquire: []error{nil, nil}, done: cancel}
		c := client{server: scripted{s}, log: slog.New(slog.DiscardHandler), set: func(settings) error { return errors.New("no room") }}
		c.run(ctx)
		want := []string{"0s discover invalid IP", "1s discover invalid IP", "3s discover invalid IP"}
		if d := cmp.Diff(want, s.said); d != "" {
			t.Errorf("what happened (-want +got):\n%s", d)
		}
	})
}
