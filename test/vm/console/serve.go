package console

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Serve says that the guest is up and runs commands until port ends. It returns when all of them have ended, which it
// sees to.
func Serve(port io.ReadWriter) error {
	s := &server{to: json.NewEncoder(port), running: make(map[int]*os.Process)}
	if err := s.send(answer{}); err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.signalAll(syscall.SIGKILL)
	for from := json.NewDecoder(port); ; {
		var req request
		if err := from.Decode(&req); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read from the serial port: %w", err)
		}
		if req.Command == nil {
			s.signal(req.ID, syscall.Signal(req.Signal))
			continue
		}
		wg.Go(func() { s.send(s.run(req.ID, *req.Command)) })
	}
}

type server struct {
	sending sync.Mutex
	to      *json.Encoder

	mu      sync.Mutex
	running map[int]*os.Process
}

func (s *server) send(a answer) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.to.Encode(a)
}

// run runs a command and tells how it ended.
func (s *server) run(id int, c Command) answer {
	end := answer{ID: id, Ended: true, Status: -1}
	var out, errs bytes.Buffer
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second // its children may keep its outputs
	if c.Log != "" {
		f, err := os.OpenFile(c.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			end.Fault = err.Error()
			return end
		}
		defer f.Close()
		cmd.Stdout, cmd.Stderr = f, f
	}
	if err := cmd.Start(); err != nil {
		end.Fault = err.Error()
		return end
	}
	s.mu.Lock()
	s.running[id] = cmd.Process
	s.mu.Unlock()
	s.send(answer{ID: id, PID: cmd.Process.Pid})
	err := cmd.Wait()
	s.mu.Lock()
	delete(s.running, id)
	s.mu.Unlock()
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		end.Fault = err.Error()
	}
	end.Status, end.Out, end.Err = cmd.ProcessState.ExitCode(), out.Bytes(), errs.Bytes()
	return end
}

func (s *server) signal(id int, sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.running[id]; p != nil {
		p.Signal(sig)
	}
}

func (s *server) signalAll(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.running {
		p.Signal(sig)
	}
}
