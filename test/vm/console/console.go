// Package console runs commands in a virtual machine over its serial port: a Client in the host, Serve in the guest. Each message is a
// line of JSON; commands run side by side.
package console

// Command is what to run.
type Command struct {
	Args []string
	Env  []string `json:",omitempty"` // in addition to the guest's own
	Log  string   `json:",omitempty"` // a file in the guest that takes both outputs, appended; "": they come back
}

// request is what the host sends: a command, or a signal to one that runs.
type request struct {
	ID      int
	Command *Command `json:",omitempty"`
	Signal  int      `json:",omitempty"`
}

// answer is what the guest sends: for a command first that it started, then how it ended. Without an ID it says that the guest is up.
type answer struct {
	ID     int
	PID    int    `json:",omitempty"` // it started
	Ended  bool   `json:",omitempty"`
	Status int    `json:",omitempty"`
	Fault  string `json:",omitempty"` // why it did not start, or how it ended if not by an exit status of 0
	Out    []byte `json:",omitempty"`
	Err    []byte `json:",omitempty"`
}
