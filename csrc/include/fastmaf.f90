! fastmaf for Fortran 2008: densities and samples of masked autoregressive flows, from files that `flow.save` writes in Python.
!
!     use fastmaf
!     type(flow_model) :: model          ! immutable, shared by threads
!     type(flow_evaluator) :: flow       ! one per thread
!     call model%open('flow.safetensors')
!     call flow%create(model)
!     call flow%log_prob(x, log_p)          ! x(features, samples), log_p(samples)
!
! Compile this file with your program and link libfastmaf.
!
! Arrays are Fortran's own: x(features, samples), nothing is transposed or copied, sections such as x(1:3, ::2) may be given.
! All arrays of a call have one kind, real32 or real64, whatever the dtype of the flow. A context is context(context_features), one
! for all samples, or context(context_features, samples), one for each; it is left out for a flow without.
!
! Errors. Each procedure takes `stat` and `errmsg` as Fortran's own statements do: stat becomes 0 (fastmaf_ok) or one of the statuses
! below, and errmsg the text of an error, unchanged without one. Without stat an error writes the text and stops the program (error
! stop). What a failed call has written is undefined.
!
! On a GPU: `call flow%create(model, device=0)`, in a library that was built with CUDA. Arrays of a call lie all on that device or all on the
! host. Memory of the device becomes an array by c_f_pointer(address, x, [features, samples]); calls then enqueue their work on the stream
! of set_stream and return, and outputs are contiguous, in the kind of the flow (samples in either): see fastmaf.h.
!
! Models and evaluators free what they hold when they go out of scope, or by `close`. An assigned model shares the weights (assign and
! close models in one thread at a time); an assigned evaluator is another one, not created yet.
module fastmaf
    use, intrinsic :: iso_c_binding, only: c_associated, c_char, c_f_pointer, c_int, c_int32_t, c_int64_t, c_intptr_t, c_loc, &
        c_null_char, c_null_ptr, c_ptr, c_size_t
    use, intrinsic :: iso_fortran_env, only: error_unit, int32, int64, real32, real64
    implicit none
    private
    public :: flow_model, flow_evaluator, fastmaf_version, fastmaf_devices

    integer, parameter, public :: fastmaf_ok = 0
    integer, parameter, public :: fastmaf_invalid_argument = 1  ! an array that does not fit the model or another array, no model
    integer, parameter, public :: fastmaf_cannot_read = 2       ! the file cannot be opened or read
    integer, parameter, public :: fastmaf_invalid_file = 3      ! it is no flow, or a damaged one
    integer, parameter, public :: fastmaf_unsupported = 4       ! the model has no such thing, or the library no code for it
    integer, parameter, public :: fastmaf_out_of_memory = 5
    integer, parameter, public :: fastmaf_internal = 6
    integer, parameter, public :: fastmaf_device_error = 7      ! there is no such GPU here, or CUDA failed on it

    ! Precisions of products of matrices on a GPU; see fastmaf.h.
    integer, parameter, public :: fastmaf_highest = 0, fastmaf_high = 1, fastmaf_medium = 2

    integer(c_int32_t), parameter :: abi = 0  ! FASTMAF_ABI_VERSION of fastmaf.h
    integer, parameter :: float32 = 0, float64 = 1, longest = 512

    ! The structures of fastmaf.h.
    type, bind(c) :: c_array
        type(c_ptr) :: data = c_null_ptr
        integer(c_int32_t) :: dtype = 0
        integer(c_int64_t) :: group_stride = 0, row_stride = 0, column_stride = 0
    end type
    type, bind(c) :: c_output
        type(c_ptr) :: data = c_null_ptr
        integer(c_int32_t) :: dtype = 0
        integer(c_int64_t) :: row_stride = 0, column_stride = 0
    end type

    ! Numbers in memory: the first extent is that of a sample, the others count samples.
    type :: view
        type(c_ptr) :: data = c_null_ptr
        integer :: dtype = float64, rank = 0
        integer(int64) :: extent(3) = 1, stride(3) = 0
    end type

    type :: shared_handle
        type(c_ptr) :: handle = c_null_ptr
        integer :: owners = 0
    end type

    ! A flow: immutable, may be read by all threads.
    type :: flow_model
        private
        type(shared_handle), pointer :: shared => null()
    contains
        procedure :: open => model_open                          ! (path, stat, errmsg)
        procedure :: from_memory => model_from_memory            ! (bytes, stat, errmsg): the content of a file, character(*)
        procedure :: close => model_close
        procedure :: is_open => model_is_open
        procedure :: features => model_features                  ! all of these are -1 before open
        procedure :: context_features => model_context_features  ! 0 for a flow without
        procedure :: layers => model_layers
        procedure :: members => model_members                    ! of an ensemble, which has densities, gradients, samples; 0 for a flow
        procedure :: parameters => model_parameters
        procedure :: most_values => model_most_values            ! of a discrete variable: 1 if Bernoulli; 0 if none is
        procedure :: double_precision => model_double_precision  ! whether it computes in real64
        procedure :: name => model_name                          ! of variable i; '' where the flow has none
        procedure :: memory => model_memory                      ! bytes that weights take now
        procedure, private :: share => model_share
        generic :: assignment(=) => share
        final :: model_final
    end type

    ! What a calling thread needs to evaluate a model.
    type :: flow_evaluator
        private
        type(c_ptr) :: handle = c_null_ptr
        integer(int64) :: features = 0, context_features = 0, most_values = 0
    contains
        ! (model, threads, stat, errmsg, device, precision): one thread, unless asked for more; with a device on that GPU, which
        ! takes no threads
        procedure :: create => evaluator_create
        procedure :: set_stream => evaluator_set_stream          ! (stream, stat, errmsg): type(c_ptr), a cudaStream_t of the GPU
        procedure :: close => evaluator_close
        procedure, private :: forget => evaluator_forget
        generic :: assignment(=) => forget
        ! log_prob(x, log_prob, context, stat, errmsg)
        procedure, private :: log_prob_each_real32, log_prob_one_real32
        procedure, private :: log_prob_each_real64, log_prob_one_real64
        generic :: log_prob => log_prob_each_real32, log_prob_one_real32, &
            log_prob_each_real64, log_prob_one_real64
        ! to_noise(x, noise, context, stat, errmsg)
        procedure, private :: to_noise_each_real32, to_noise_one_real32
        procedure, private :: to_noise_each_real64, to_noise_one_real64
        generic :: to_noise => to_noise_each_real32, to_noise_one_real32, &
            to_noise_each_real64, to_noise_one_real64
        ! from_noise(noise, x, context, stat, errmsg)
        procedure, private :: from_noise_each_real32, from_noise_one_real32
        procedure, private :: from_noise_each_real64, from_noise_one_real64
        generic :: from_noise => from_noise_each_real32, from_noise_one_real32, &
            from_noise_each_real64, from_noise_one_real64
        ! conditional_probs(x, probabilities, context, stat, errmsg)
        procedure, private :: conditional_probs_each_real32, conditional_probs_one_real32
        procedure, private :: conditional_probs_each_real64, conditional_probs_one_real64
        procedure, private :: conditional_probs_of_each_each_real32, conditional_probs_of_each_one_real32
        procedure, private :: conditional_probs_of_each_each_real64, conditional_probs_of_each_one_real64
        generic :: conditional_probs => conditional_probs_each_real32, conditional_probs_one_real32, &
            conditional_probs_each_real64, conditional_probs_one_real64, &
            conditional_probs_of_each_each_real32, conditional_probs_of_each_one_real32, &
            conditional_probs_of_each_each_real64, conditional_probs_of_each_one_real64
        ! log_prob_and_grad(x, log_prob, d_x, context, d_context, stat, errmsg)
        procedure, private :: log_prob_and_grad_each_real32, log_prob_and_grad_one_real32
        procedure, private :: log_prob_and_grad_each_real64, log_prob_and_grad_one_real64
        generic :: log_prob_and_grad => log_prob_and_grad_each_real32, log_prob_and_grad_one_real32, &
            log_prob_and_grad_each_real64, log_prob_and_grad_one_real64
        ! sample(samples, [context,] seed, offset, context_offset, log_prob, stat, errmsg)
        procedure, private :: sample_none_real32, sample_one_real32
        procedure, private :: sample_each_real32, sample_groups_real32
        procedure, private :: sample_none_real64, sample_one_real64
        procedure, private :: sample_each_real64, sample_groups_real64
        generic :: sample => sample_none_real32, sample_one_real32, &
            sample_each_real32, sample_groups_real32, &
            sample_none_real64, sample_one_real64, &
            sample_each_real64, sample_groups_real64
        final :: evaluator_final
    end type

    interface
        function c_abi_version() bind(c, name='fastmaf_abi_version') result(version)
            import :: c_int32_t
            integer(c_int32_t) :: version
        end function
        function c_version() bind(c, name='fastmaf_version') result(text)
            import :: c_ptr
            type(c_ptr) :: text
        end function
        function c_strlen(text) bind(c, name='strlen') result(length)
            import :: c_ptr, c_size_t
            type(c_ptr), value :: text
            integer(c_size_t) :: length
        end function
        function c_model_open(path, model, message, size) bind(c, name='fastmaf_model_open') result(status)
            import :: c_char, c_int, c_ptr, c_size_t
            character(kind=c_char), intent(in) :: path(*)
            type(c_ptr), intent(out) :: model
            character(kind=c_char), intent(inout) :: message(*)
            integer(c_size_t), value :: size
            integer(c_int) :: status
        end function
        function c_model_from_memory(bytes, count, model, message, size) &
            bind(c, name='fastmaf_model_from_memory') result(status)
            import :: c_char, c_int, c_ptr, c_size_t
            character(kind=c_char), intent(in) :: bytes(*)
            integer(c_size_t), value :: count, size
            type(c_ptr), intent(out) :: model
            character(kind=c_char), intent(inout) :: message(*)
            integer(c_int) :: status
        end function
        subroutine c_model_free(model) bind(c, name='fastmaf_model_free')
            import :: c_ptr
            type(c_ptr), value :: model
        end subroutine
        function c_model_features(model) bind(c, name='fastmaf_model_features') result(number)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t) :: number
        end function
        function c_model_context_features(model) bind(c, name='fastmaf_model_context_features') result(number)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t) :: number
        end function
        function c_model_layers(model) bind(c, name='fastmaf_model_layers') result(number)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t) :: number
        end function
        function c_model_parameters(model) bind(c, name='fastmaf_model_parameters') result(number)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t) :: number
        end function
        function c_model_members(model) bind(c, name='fastmaf_model_members') result(number)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t) :: number
        end function
        function c_model_most_values(model) bind(c, name='fastmaf_model_most_values') result(number)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t) :: number
        end function
        function c_model_dtype(model) bind(c, name='fastmaf_model_dtype') result(dtype)
            import :: c_int, c_ptr
            type(c_ptr), value :: model
            integer(c_int) :: dtype
        end function
        function c_model_name(model, feature) bind(c, name='fastmaf_model_name') result(name)
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
            integer(c_int64_t), value :: feature
            type(c_ptr) :: name
        end function
        function c_model_memory(model) bind(c, name='fastmaf_model_memory') result(bytes)
            import :: c_ptr, c_size_t
            type(c_ptr), value :: model
            integer(c_size_t) :: bytes
        end function
        function c_evaluator_create(model, threads, evaluator, message, size) &
            bind(c, name='fastmaf_evaluator_create') result(status)
            import :: c_char, c_int, c_int32_t, c_ptr, c_size_t
            type(c_ptr), value :: model
            integer(c_int32_t), value :: threads
            type(c_ptr), intent(out) :: evaluator
            character(kind=c_char), intent(inout) :: message(*)
            integer(c_size_t), value :: size
            integer(c_int) :: status
        end function
        function c_evaluator_create_on_device(model, device, precision, evaluator, message, size) &
            bind(c, name='fastmaf_evaluator_create_on_device') result(status)
            import :: c_char, c_int, c_int32_t, c_ptr, c_size_t
            type(c_ptr), value :: model
            integer(c_int32_t), value :: device, precision
            type(c_ptr), intent(out) :: evaluator
            character(kind=c_char), intent(inout) :: message(*)
            integer(c_size_t), value :: size
            integer(c_int) :: status
        end function
        function c_evaluator_set_stream(evaluator, stream) bind(c, name='fastmaf_evaluator_set_stream') result(status)
            import :: c_int, c_ptr
            type(c_ptr), value :: evaluator, stream
            integer(c_int) :: status
        end function
        function c_devices(message, size) bind(c, name='fastmaf_devices') result(number)
            import :: c_char, c_int32_t, c_size_t
            character(kind=c_char), intent(inout) :: message(*)
            integer(c_size_t), value :: size
            integer(c_int32_t) :: number
        end function
        subroutine c_evaluator_free(evaluator) bind(c, name='fastmaf_evaluator_free')
            import :: c_ptr
            type(c_ptr), value :: evaluator
        end subroutine
        function c_message(evaluator) bind(c, name='fastmaf_message') result(text)
            import :: c_ptr
            type(c_ptr), value :: evaluator
            type(c_ptr) :: text
        end function
        function c_log_prob_and_grad(evaluator, groups, rows, x, context, log_prob, d_x, d_context) &
            bind(c, name='fastmaf_log_prob_and_grad') result(status)
            import :: c_int, c_int64_t, c_ptr
            type(c_ptr), value :: evaluator, x, context, log_prob, d_x, d_context
            integer(c_int64_t), value :: groups, rows
            integer(c_int) :: status
        end function
        function c_sample(evaluator, groups, rows, context, seed, offset, context_offset, samples, log_prob) &
            bind(c, name='fastmaf_sample') result(status)
            import :: c_int, c_int32_t, c_int64_t, c_ptr
            type(c_ptr), value :: evaluator, context, samples, log_prob
            integer(c_int64_t), value :: groups, rows, seed, offset
            integer(c_int32_t), value :: context_offset
            integer(c_int) :: status
        end function
        function c_log_prob(evaluator, groups, rows, x, context, output) &
            bind(c, name='fastmaf_log_prob') result(status)
            import :: c_int, c_int64_t, c_ptr
            type(c_ptr), value :: evaluator, x, context, output
            integer(c_int64_t), value :: groups, rows
            integer(c_int) :: status
        end function
        function c_to_noise(evaluator, groups, rows, x, context, output) &
            bind(c, name='fastmaf_to_noise') result(status)
            import :: c_int, c_int64_t, c_ptr
            type(c_ptr), value :: evaluator, x, context, output
            integer(c_int64_t), value :: groups, rows
            integer(c_int) :: status
        end function
        function c_from_noise(evaluator, groups, rows, x, context, output) &
            bind(c, name='fastmaf_from_noise') result(status)
            import :: c_int, c_int64_t, c_ptr
            type(c_ptr), value :: evaluator, x, context, output
            integer(c_int64_t), value :: groups, rows
            integer(c_int) :: status
        end function
        function c_conditional_probs(evaluator, groups, rows, x, context, output) &
            bind(c, name='fastmaf_conditional_probs') result(status)
            import :: c_int, c_int64_t, c_ptr
            type(c_ptr), value :: evaluator, x, context, output
            integer(c_int64_t), value :: groups, rows
            integer(c_int) :: status
        end function
    end interface

contains

    ! Version of the library that runs, such as 0.1.0.
    function fastmaf_version() result(version)
        character(:), allocatable :: version
        version = text_at(c_version())
    end function

    ! Number of GPUs that evaluators can be created for; where it is 0, `reason` says why.
    function fastmaf_devices(reason) result(number)
        character(:), allocatable, intent(out), optional :: reason
        character(kind=c_char) :: message(longest)
        integer :: number
        message(1) = c_null_char
        number = int(c_devices(message, int(longest, c_size_t)))
        if (present(reason)) reason = joined(message)
    end function

    ! Models

    subroutine model_open(self, path, stat, errmsg)
        class(flow_model), intent(inout) :: self
        character(*), intent(in) :: path
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        character(kind=c_char) :: message(longest)
        type(c_ptr) :: handle
        integer :: status
        call self%close()
        if (stale(stat, errmsg)) return
        message(1) = c_null_char
        status = c_model_open(characters(trim(path) // c_null_char), handle, message, int(longest, c_size_t))
        call adopt(self, status, handle, message, stat, errmsg)
    end subroutine

    subroutine model_from_memory(self, bytes, stat, errmsg)
        class(flow_model), intent(inout) :: self
        character(*), intent(in) :: bytes
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        character(kind=c_char) :: message(longest)
        type(c_ptr) :: handle
        integer :: status
        call self%close()
        if (stale(stat, errmsg)) return
        message(1) = c_null_char
        status = c_model_from_memory(bytes, int(len(bytes), c_size_t), handle, message, int(longest, c_size_t))
        call adopt(self, status, handle, message, stat, errmsg)
    end subroutine

    subroutine adopt(self, status, handle, message, stat, errmsg)
        class(flow_model), intent(inout) :: self
        integer, intent(in) :: status
        type(c_ptr), intent(in) :: handle
        character(kind=c_char), intent(in) :: message(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        if (status == fastmaf_ok) then
            allocate (self%shared)
            self%shared%handle = handle
            self%shared%owners = 1
        end if
        call finish(status, joined(message), stat, errmsg)
    end subroutine

    subroutine model_share(self, other)
        class(flow_model), intent(inout) :: self
        class(flow_model), intent(in) :: other
        type(shared_handle), pointer :: from
        from => other%shared
        if (associated(from)) from%owners = from%owners + 1
        call self%close()
        self%shared => from
    end subroutine

    subroutine model_close(self)
        class(flow_model), intent(inout) :: self
        if (.not. associated(self%shared)) return
        self%shared%owners = self%shared%owners - 1
        if (self%shared%owners == 0) then
            call c_model_free(self%shared%handle)
            deallocate (self%shared)
        end if
        nullify (self%shared)
    end subroutine

    subroutine model_final(self)
        type(flow_model), intent(inout) :: self
        call self%close()
    end subroutine

    function handle_of(model) result(handle)
        class(flow_model), intent(in) :: model
        type(c_ptr) :: handle
        handle = c_null_ptr
        if (associated(model%shared)) handle = model%shared%handle
    end function

    function model_is_open(self) result(is_open)
        class(flow_model), intent(in) :: self
        logical :: is_open
        is_open = associated(self%shared)
    end function

    function model_features(self) result(number)
        class(flow_model), intent(in) :: self
        integer :: number
        number = int(c_model_features(handle_of(self)))
    end function

    function model_context_features(self) result(number)
        class(flow_model), intent(in) :: self
        integer :: number
        number = int(c_model_context_features(handle_of(self)))
    end function

    function model_layers(self) result(number)
        class(flow_model), intent(in) :: self
        integer :: number
        number = int(c_model_layers(handle_of(self)))
    end function

    function model_parameters(self) result(number)
        class(flow_model), intent(in) :: self
        integer :: number
        number = int(c_model_parameters(handle_of(self)))
    end function

    function model_members(self) result(number)
        class(flow_model), intent(in) :: self
        integer :: number
        number = int(c_model_members(handle_of(self)))
    end function

    function model_most_values(self) result(number)
        class(flow_model), intent(in) :: self
        integer :: number
        number = int(c_model_most_values(handle_of(self)))
    end function

    function model_double_precision(self) result(double_precision)
        class(flow_model), intent(in) :: self
        logical :: double_precision
        double_precision = c_model_dtype(handle_of(self)) == float64
    end function

    function model_memory(self) result(bytes)
        class(flow_model), intent(in) :: self
        integer(int64) :: bytes
        bytes = int(c_model_memory(handle_of(self)), int64)
    end function

    function model_name(self, i) result(name)
        class(flow_model), intent(in) :: self
        integer, intent(in) :: i
        character(:), allocatable :: name
        name = text_at(c_model_name(handle_of(self), int(i - 1, c_int64_t)))
    end function

    ! Evaluators

    subroutine evaluator_create(self, model, threads, stat, errmsg, device, precision)
        class(flow_evaluator), intent(inout) :: self
        class(flow_model), intent(in) :: model
        integer, intent(in), optional :: threads
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        integer, intent(in), optional :: device, precision
        character(kind=c_char) :: message(longest)
        integer(c_int32_t) :: together, products
        integer :: status
        call self%close()
        if (.not. model%is_open()) then
            call finish(fastmaf_invalid_argument, 'the model is not open: call model%open(path) first', stat, errmsg)
            return
        end if
        if (present(threads) .and. present(device) .or. present(precision) .and. .not. present(device)) then
            call finish(fastmaf_invalid_argument, 'threads are those of the CPU, precision is that of a device', stat, errmsg)
            return
        end if
        message(1) = c_null_char
        if (present(device)) then
            products = fastmaf_high
            if (present(precision)) products = int(precision, c_int32_t)
            status = c_evaluator_create_on_device(handle_of(model), int(device, c_int32_t), products, self%handle, message, &
                int(longest, c_size_t))
        else
            together = 1
            if (present(threads)) together = int(threads, c_int32_t)
            status = c_evaluator_create(handle_of(model), together, self%handle, message, int(longest, c_size_t))
        end if
        self%features = model%features()
        self%context_features = model%context_features()
        self%most_values = max(1, model%most_values())
        call finish(status, joined(message), stat, errmsg)
    end subroutine

    subroutine evaluator_set_stream(self, stream, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        type(c_ptr), intent(in) :: stream
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        integer :: status
        status = c_evaluator_set_stream(self%handle, stream)
        call finish(status, message_of(self, status), stat, errmsg)
    end subroutine

    ! Evaluators own what they hold alone, so none takes over that of another.
    subroutine evaluator_forget(self, other)
        class(flow_evaluator), intent(inout) :: self
        class(flow_evaluator), intent(in) :: other
        if (.not. c_associated(self%handle, other%handle)) call self%close()
    end subroutine

    subroutine evaluator_close(self)
        class(flow_evaluator), intent(inout) :: self
        call c_evaluator_free(self%handle)
        self%handle = c_null_ptr
    end subroutine

    subroutine evaluator_final(self)
        type(flow_evaluator), intent(inout) :: self
        call self%close()
    end subroutine

    ! Log-densities in nats: log_prob(samples). -inf at or outside a bound and at infinity; NaN for a sample with a NaN.

    subroutine log_prob_each_real32(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: log_prob(:)
        real(real32), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_log_prob, view2_real32(x), view2_real32(context), 'log_prob', &
            numbers(view1_real32(log_prob)), 1_int64, stat, errmsg)
    end subroutine

    subroutine log_prob_one_real32(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: log_prob(:)
        real(real32), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_log_prob, view2_real32(x), row(view1_real32(context)), 'log_prob', &
            numbers(view1_real32(log_prob)), 1_int64, stat, errmsg)
    end subroutine

    subroutine log_prob_each_real64(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: log_prob(:)
        real(real64), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_log_prob, view2_real64(x), view2_real64(context), 'log_prob', &
            numbers(view1_real64(log_prob)), 1_int64, stat, errmsg)
    end subroutine

    subroutine log_prob_one_real64(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: log_prob(:)
        real(real64), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_log_prob, view2_real64(x), row(view1_real64(context)), 'log_prob', &
            numbers(view1_real64(log_prob)), 1_int64, stat, errmsg)
    end subroutine

    ! The noise that samples come from, noise(features, samples): standard normal where the flow fits.

    subroutine to_noise_each_real32(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: noise(:, :)
        real(real32), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_to_noise, view2_real32(x), view2_real32(context), 'noise', &
            view2_real32(noise), self%features, stat, errmsg)
    end subroutine

    subroutine to_noise_one_real32(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: noise(:, :)
        real(real32), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_to_noise, view2_real32(x), row(view1_real32(context)), 'noise', &
            view2_real32(noise), self%features, stat, errmsg)
    end subroutine

    subroutine to_noise_each_real64(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: noise(:, :)
        real(real64), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_to_noise, view2_real64(x), view2_real64(context), 'noise', &
            view2_real64(noise), self%features, stat, errmsg)
    end subroutine

    subroutine to_noise_one_real64(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: noise(:, :)
        real(real64), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_to_noise, view2_real64(x), row(view1_real64(context)), 'noise', &
            view2_real64(noise), self%features, stat, errmsg)
    end subroutine

    ! The samples that noise turns into: the inverse of to_noise.

    subroutine from_noise_each_real32(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: noise(:, :)
        real(real32), intent(inout), target :: x(:, :)
        real(real32), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_from_noise, view2_real32(noise), view2_real32(context), 'x', &
            view2_real32(x), self%features, stat, errmsg)
    end subroutine

    subroutine from_noise_one_real32(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: noise(:, :)
        real(real32), intent(inout), target :: x(:, :)
        real(real32), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_from_noise, view2_real32(noise), row(view1_real32(context)), 'x', &
            view2_real32(x), self%features, stat, errmsg)
    end subroutine

    subroutine from_noise_each_real64(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: noise(:, :)
        real(real64), intent(inout), target :: x(:, :)
        real(real64), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_from_noise, view2_real64(noise), view2_real64(context), 'x', &
            view2_real64(x), self%features, stat, errmsg)
    end subroutine

    subroutine from_noise_one_real64(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: noise(:, :)
        real(real64), intent(inout), target :: x(:, :)
        real(real64), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_from_noise, view2_real64(noise), row(view1_real64(context)), 'x', &
            view2_real64(x), self%features, stat, errmsg)
    end subroutine

    ! Probabilities of the values of discrete variables given those before them: (features, samples) that each is 1, or
    ! (most values, features, samples), NaN for variables that may have any number.

    subroutine conditional_probs_each_real32(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: probabilities(:, :)
        real(real32), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real32(x), view2_real32(context), 'probabilities', &
            view2_real32(probabilities), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_one_real32(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: probabilities(:, :)
        real(real32), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real32(x), row(view1_real32(context)), 'probabilities', &
            view2_real32(probabilities), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_each_real64(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: probabilities(:, :)
        real(real64), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real64(x), view2_real64(context), 'probabilities', &
            view2_real64(probabilities), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_one_real64(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: probabilities(:, :)
        real(real64), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real64(x), row(view1_real64(context)), 'probabilities', &
            view2_real64(probabilities), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_of_each_each_real32(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: probabilities(:, :, :)
        real(real32), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real32(x), view2_real32(context), 'probabilities', &
            merged(view3_real32(probabilities), 1), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_of_each_one_real32(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: probabilities(:, :, :)
        real(real32), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real32(x), row(view1_real32(context)), 'probabilities', &
            merged(view3_real32(probabilities), 1), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_of_each_each_real64(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: probabilities(:, :, :)
        real(real64), intent(in), optional, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real64(x), view2_real64(context), 'probabilities', &
            merged(view3_real64(probabilities), 1), self%features * self%most_values, stat, errmsg)
    end subroutine

    subroutine conditional_probs_of_each_one_real64(self, x, probabilities, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: probabilities(:, :, :)
        real(real64), intent(in), target :: context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call map(self, c_conditional_probs, view2_real64(x), row(view1_real64(context)), 'probabilities', &
            merged(view3_real64(probabilities), 1), self%features * self%most_values, stat, errmsg)
    end subroutine

    ! And their gradients: d_x(features, samples); d_context of the shape of the context, summed over the samples that
    ! share one.

    subroutine log_prob_and_grad_each_real32(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: log_prob(:), d_x(:, :)
        real(real32), intent(in), optional, target :: context(:, :)
        real(real32), intent(inout), optional, target :: d_context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call gradient(self, view2_real32(x), view2_real32(context), numbers(view1_real32(log_prob)), view2_real32(d_x), &
            view2_real32(d_context), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_one_real32(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), target :: x(:, :)
        real(real32), intent(inout), target :: log_prob(:), d_x(:, :)
        real(real32), intent(in), target :: context(:)
        real(real32), intent(inout), optional, target :: d_context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call gradient(self, view2_real32(x), row(view1_real32(context)), numbers(view1_real32(log_prob)), view2_real32(d_x), &
            row(view1_real32(d_context)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_each_real64(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: log_prob(:), d_x(:, :)
        real(real64), intent(in), optional, target :: context(:, :)
        real(real64), intent(inout), optional, target :: d_context(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call gradient(self, view2_real64(x), view2_real64(context), numbers(view1_real64(log_prob)), view2_real64(d_x), &
            view2_real64(d_context), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_one_real64(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), target :: x(:, :)
        real(real64), intent(inout), target :: log_prob(:), d_x(:, :)
        real(real64), intent(in), target :: context(:)
        real(real64), intent(inout), optional, target :: d_context(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call gradient(self, view2_real64(x), row(view1_real64(context)), numbers(view1_real64(log_prob)), view2_real64(d_x), &
            row(view1_real64(d_context)), stat, errmsg)
    end subroutine

    ! Samples: samples(features, n); under contexts (context_features, c) one for each, or samples(features, n, c).
    ! Sample j of context i is a function of seed, offset + j and context_offset + i alone: parts of a stream may be drawn anywhere.
    ! log_prob(n), or (n, c), takes the log-density of each at no further cost.

    subroutine sample_none_real32(self, samples, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(inout), target :: samples(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(inout), optional, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view2_real32(samples), numbers(view1_real32(log_prob)), view(), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_one_real32(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(inout), target :: samples(:, :)
        real(real32), intent(in), target :: context(:)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(inout), optional, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view2_real32(samples), numbers(view1_real32(log_prob)), row(view1_real32(context)), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_each_real32(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(inout), target :: samples(:, :)
        real(real32), intent(in), target :: context(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(inout), optional, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view2_real32(samples), numbers(view1_real32(log_prob)), view2_real32(context), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_groups_real32(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(inout), target :: samples(:, :, :)
        real(real32), intent(in), target :: context(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(inout), optional, target :: log_prob(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view3_real32(samples), numbers(view2_real32(log_prob)), view2_real32(context), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_none_real64(self, samples, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(inout), target :: samples(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(inout), optional, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view2_real64(samples), numbers(view1_real64(log_prob)), view(), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_one_real64(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(inout), target :: samples(:, :)
        real(real64), intent(in), target :: context(:)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(inout), optional, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view2_real64(samples), numbers(view1_real64(log_prob)), row(view1_real64(context)), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_each_real64(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(inout), target :: samples(:, :)
        real(real64), intent(in), target :: context(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(inout), optional, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view2_real64(samples), numbers(view1_real64(log_prob)), view2_real64(context), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    subroutine sample_groups_real64(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(inout), target :: samples(:, :, :)
        real(real64), intent(in), target :: context(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(inout), optional, target :: log_prob(:, :)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        call draw(self, view3_real64(samples), numbers(view2_real64(log_prob)), view2_real64(context), seed, offset, &
            context_offset, stat, errmsg)
    end subroutine

    ! What the specific procedures share

    ! log_prob, to_noise, from_noise, conditional_probs: a function of x and its context with one output.
    subroutine map(self, call_c, x, context, name, output, columns, stat, errmsg)
        class(flow_evaluator), intent(in) :: self
        character(*), intent(in) :: name
        procedure(c_log_prob) :: call_c
        type(view), intent(in) :: x, context, output
        integer(int64), intent(in) :: columns
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        type(c_array), target :: from, given
        type(c_output), target :: to
        character(:), allocatable :: misfit
        integer :: status
        misfit = fault(self, x, context)
        if (misfit == '') misfit = output_fault(name, output, columns, x%extent(2))
        if (misfit /= '') then
            call finish(fastmaf_invalid_argument, misfit, stat, errmsg)
            return
        end if
        status = fastmaf_ok
        if (x%extent(2) > 0) then
            from = array_of(x)
            given = array_of(context)
            to = output_of(output)
            status = call_c(self%handle, 1_c_int64_t, x%extent(2), c_loc(from), context_pointer(context, given), c_loc(to))
        end if
        call finish(status, message_of(self, status), stat, errmsg)
    end subroutine

    subroutine gradient(self, x, context, log_prob, d_x, d_context, stat, errmsg)
        class(flow_evaluator), intent(in) :: self
        type(view), intent(in) :: x, context, log_prob, d_x, d_context
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        type(c_array), target :: from, given
        type(c_output), target :: value, dx, dc
        type(c_ptr) :: wanted
        character(:), allocatable :: misfit
        integer :: status
        misfit = fault(self, x, context)
        if (misfit == '') misfit = output_fault('log_prob', log_prob, 1_int64, x%extent(2))
        if (misfit == '') misfit = output_fault('d_x', d_x, self%features, x%extent(2))
        if (misfit == '' .and. d_context%rank > 0) then
            misfit = 'd_context is given without a context'
            if (context%rank > 0) misfit = output_fault('d_context', d_context, self%context_features, context%extent(2))
        end if
        if (misfit /= '') then
            call finish(fastmaf_invalid_argument, misfit, stat, errmsg)
            return
        end if
        status = fastmaf_ok
        if (x%extent(2) > 0) then
            from = array_of(x)
            given = array_of(context)
            value = output_of(log_prob)
            dx = output_of(d_x)
            dc = output_of(d_context)
            wanted = c_null_ptr
            if (d_context%rank > 0) wanted = c_loc(dc)
            status = c_log_prob_and_grad(self%handle, 1_c_int64_t, x%extent(2), c_loc(from), context_pointer(context, given), &
                c_loc(value), c_loc(dx), wanted)
        end if
        call finish(status, message_of(self, status), stat, errmsg)
    end subroutine

    ! samples(features, samples, groups), a context for each group; log_prob likewise, or none.
    subroutine draw(self, samples, log_prob, context, seed, offset, context_offset, stat, errmsg)
        class(flow_evaluator), intent(in) :: self
        type(view), intent(in) :: samples, log_prob, context
        type(view) :: rows_of, values_of
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        type(c_array), target :: given
        type(c_output), target :: to, value
        type(c_ptr) :: wanted
        integer(int64) :: first, rows, groups
        integer(int32) :: first_context
        character(:), allocatable :: misfit
        integer :: status
        first = 0
        if (present(offset)) first = offset
        first_context = 0
        if (present(context_offset)) first_context = context_offset
        groups = 1
        if (context%rank == 2) groups = context%extent(2)
        rows = samples%extent(2)
        if (samples%rank == 3) then
            if (samples%extent(3) /= groups) groups = -1
        else if (context%rank == 2) then
            if (rows /= groups) groups = -1
            rows = 1
        end if
        rows_of = merged(samples, 2)
        values_of = merged(log_prob, 2)
        misfit = ''
        if (.not. c_associated(self%handle)) then
            misfit = 'the evaluator is not created: call flow%create(model) first'
        else if (groups < 0) then
            misfit = 'samples and context differ in the number of contexts'
        else if (samples%extent(1) /= self%features) then
            misfit = 'samples(features, ...): the flow has ' // decimal(self%features) // ' features'
        else if (context%rank > 0 .and. context%extent(1) /= self%context_features) then
            misfit = 'context: the flow has ' // decimal(self%context_features) // ' context features'
        else if (context%rank == 0 .and. self%context_features > 0) then
            misfit = 'the flow needs a context'
        else if (first < 0) then
            misfit = 'offset is negative'
        else if (first_context < 0) then
            misfit = 'context_offset is negative'
        else if (rows_of%extent(2) < 0) then
            misfit = 'samples: groups must lie one behind the other'
        else if (log_prob%rank > 0) then
            if (log_prob%extent(2) * log_prob%extent(3) /= rows * groups) then
                misfit = 'log_prob needs a number for each sample'
            else if (values_of%extent(2) < 0) then
                misfit = 'log_prob: groups must lie one behind the other'
            end if
        end if
        if (misfit /= '') then
            call finish(fastmaf_invalid_argument, misfit, stat, errmsg)
            return
        end if
        status = fastmaf_ok
        if (rows * groups > 0) then
            given = array_of(context)
            given%group_stride = context%stride(2)
            to = output_of(rows_of)
            value = output_of(values_of)
            wanted = c_null_ptr
            if (log_prob%rank > 0) wanted = c_loc(value)
            status = c_sample(self%handle, groups, rows, context_pointer(context, given), seed, first, first_context, &
                c_loc(to), wanted)
        end if
        call finish(status, message_of(self, status), stat, errmsg)
    end subroutine

    ! An axis and the one behind it as one; of extent -1 where it has no single stride.
    pure function merged(array, axis) result(one)
        type(view), intent(in) :: array
        integer, intent(in) :: axis
        type(view) :: one
        one = array
        if (array%extent(axis) == 1) one%stride(axis) = array%stride(axis + 1)
        one%extent(axis) = array%extent(axis) * array%extent(axis + 1)
        if (all(array%extent(axis:axis + 1) > 1) .and. array%stride(axis + 1) /= array%extent(axis) * array%stride(axis)) &
            one%extent(axis) = -1
        if (axis == 1) then
            one%extent(2) = array%extent(3)
            one%stride(2) = array%stride(3)
        end if
        one%extent(3) = 1
        one%stride(3) = 0
    end function

    function fault(self, x, context) result(text)
        class(flow_evaluator), intent(in) :: self
        type(view), intent(in) :: x, context
        character(:), allocatable :: text
        text = ''
        if (.not. c_associated(self%handle)) then
            text = 'the evaluator is not created: call flow%create(model) first'
        else if (x%extent(1) /= self%features) then
            text = 'x(features, samples): the flow has ' // decimal(self%features) // ' features, not ' // decimal(x%extent(1))
        else if (context%rank == 0 .and. self%context_features > 0) then
            text = 'the flow needs a context'
        else if (context%rank > 0 .and. self%context_features == 0) then
            text = 'context is given, but the flow has none'
        else if (context%rank > 0 .and. context%extent(1) /= self%context_features) then
            text = 'context: the flow has ' // decimal(self%context_features) // ' context features, not ' // &
                decimal(context%extent(1))
        else if (context%rank == 2 .and. context%extent(2) /= x%extent(2)) then
            text = 'context has ' // decimal(context%extent(2)) // ' samples, x has ' // decimal(x%extent(2))
        end if
    end function

    function output_fault(name, output, columns, rows) result(text)
        character(*), intent(in) :: name
        type(view), intent(in) :: output
        integer(int64), intent(in) :: columns, rows
        character(:), allocatable :: text
        text = ''
        if (output%extent(1) /= columns .or. output%extent(2) /= rows) &
            text = name // ' does not fit: ' // decimal(columns) // ' numbers for each of ' // decimal(rows) // &
                ' samples are needed'
    end function

    function array_of(from) result(array)
        type(view), intent(in) :: from
        type(c_array) :: array
        array%data = from%data
        array%dtype = int(from%dtype, c_int32_t)
        array%column_stride = from%stride(1)
        array%row_stride = from%stride(2)
    end function

    function output_of(from) result(output)
        type(view), intent(in) :: from
        type(c_output) :: output
        output%data = from%data
        output%dtype = int(from%dtype, c_int32_t)
        output%column_stride = from%stride(1)
        output%row_stride = from%stride(2)
    end function

    function context_pointer(context, given) result(pointer)
        type(view), intent(in) :: context
        type(c_array), intent(in), target :: given
        type(c_ptr) :: pointer
        pointer = c_null_ptr
        if (context%rank > 0) pointer = c_loc(given)
    end function

    ! A vector as the row of numbers that all samples share: a context, or its gradient.
    function row(vector) result(same)
        type(view), intent(in) :: vector
        type(view) :: same
        same = vector
    end function

    ! A vector as numbers of samples.
    function numbers(vector) result(samples)
        type(view), intent(in) :: vector
        type(view) :: samples
        samples = vector
        samples%extent = [1_int64, vector%extent(1), vector%extent(2)]
        samples%stride = [0_int64, vector%stride(1), vector%stride(2)]
    end function

    function view1_real32(array) result(of)
        real(real32), intent(in), optional, target :: array(:)
        type(view) :: of
        if (.not. present(array)) return
        of%rank = 1
        of%dtype = float32
        of%extent(:1) = shape(array, int64)
        if (size(array) == 0) return
        of%data = c_loc(array(1))
        if (of%extent(1) > 1) of%stride(1) = distance(of%data, c_loc(array(2)), 4)
    end function

    function view1_real64(array) result(of)
        real(real64), intent(in), optional, target :: array(:)
        type(view) :: of
        if (.not. present(array)) return
        of%rank = 1
        of%dtype = float64
        of%extent(:1) = shape(array, int64)
        if (size(array) == 0) return
        of%data = c_loc(array(1))
        if (of%extent(1) > 1) of%stride(1) = distance(of%data, c_loc(array(2)), 8)
    end function

    function view2_real32(array) result(of)
        real(real32), intent(in), optional, target :: array(:, :)
        type(view) :: of
        if (.not. present(array)) return
        of%rank = 2
        of%dtype = float32
        of%extent(:2) = shape(array, int64)
        if (size(array) == 0) return
        of%data = c_loc(array(1, 1))
        if (of%extent(1) > 1) of%stride(1) = distance(of%data, c_loc(array(2, 1)), 4)
        if (of%extent(2) > 1) of%stride(2) = distance(of%data, c_loc(array(1, 2)), 4)
    end function

    function view2_real64(array) result(of)
        real(real64), intent(in), optional, target :: array(:, :)
        type(view) :: of
        if (.not. present(array)) return
        of%rank = 2
        of%dtype = float64
        of%extent(:2) = shape(array, int64)
        if (size(array) == 0) return
        of%data = c_loc(array(1, 1))
        if (of%extent(1) > 1) of%stride(1) = distance(of%data, c_loc(array(2, 1)), 8)
        if (of%extent(2) > 1) of%stride(2) = distance(of%data, c_loc(array(1, 2)), 8)
    end function

    function view3_real32(array) result(of)
        real(real32), intent(in), optional, target :: array(:, :, :)
        type(view) :: of
        if (.not. present(array)) return
        of%rank = 3
        of%dtype = float32
        of%extent(:3) = shape(array, int64)
        if (size(array) == 0) return
        of%data = c_loc(array(1, 1, 1))
        if (of%extent(1) > 1) of%stride(1) = distance(of%data, c_loc(array(2, 1, 1)), 4)
        if (of%extent(2) > 1) of%stride(2) = distance(of%data, c_loc(array(1, 2, 1)), 4)
        if (of%extent(3) > 1) of%stride(3) = distance(of%data, c_loc(array(1, 1, 2)), 4)
    end function

    function view3_real64(array) result(of)
        real(real64), intent(in), optional, target :: array(:, :, :)
        type(view) :: of
        if (.not. present(array)) return
        of%rank = 3
        of%dtype = float64
        of%extent(:3) = shape(array, int64)
        if (size(array) == 0) return
        of%data = c_loc(array(1, 1, 1))
        if (of%extent(1) > 1) of%stride(1) = distance(of%data, c_loc(array(2, 1, 1)), 8)
        if (of%extent(2) > 1) of%stride(2) = distance(of%data, c_loc(array(1, 2, 1)), 8)
        if (of%extent(3) > 1) of%stride(3) = distance(of%data, c_loc(array(1, 1, 2)), 8)
    end function

    ! Distance from a to b in numbers of `bytes` bytes.
    function distance(a, b, bytes) result(numbers)
        type(c_ptr), intent(in) :: a, b
        integer, intent(in) :: bytes
        integer(int64) :: numbers
        numbers = (transfer(b, 0_c_intptr_t) - transfer(a, 0_c_intptr_t)) / bytes
    end function

    ! Sets stat and errmsg; stops where there is no stat to set.
    subroutine finish(status, text, stat, errmsg)
        integer, intent(in) :: status
        character(*), intent(in) :: text
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        if (present(stat)) stat = status
        if (status == fastmaf_ok) return
        if (present(errmsg)) errmsg = text
        if (present(stat)) return
        write (error_unit, '(2a)') 'fastmaf: ', text
        error stop 1
    end subroutine

    function stale(stat, errmsg)
        integer, intent(out), optional :: stat
        character(*), intent(inout), optional :: errmsg
        logical :: stale
        stale = c_abi_version() /= abi
        if (stale) call finish(fastmaf_unsupported, &
            'fastmaf.f90 is of another version than libfastmaf: compile the one beside it', stat, errmsg)
    end function

    function message_of(self, status) result(text)
        class(flow_evaluator), intent(in) :: self
        integer, intent(in) :: status
        character(:), allocatable :: text
        text = ''
        if (status /= fastmaf_ok) text = text_at(c_message(self%handle))
    end function

    function text_at(address) result(text)
        type(c_ptr), intent(in) :: address
        character(:), allocatable :: text
        character(kind=c_char), pointer :: letters(:)
        text = ''
        if (.not. c_associated(address)) return
        call c_f_pointer(address, letters, [c_strlen(address)])
        text = joined(letters)
    end function

    pure function characters(text) result(letters)
        character(*), intent(in) :: text
        character(kind=c_char) :: letters(len(text))
        integer :: i
        do i = 1, len(text)
            letters(i) = text(i:i)
        end do
    end function

    ! Up to a closing zero.
    pure function joined(letters) result(text)
        character(kind=c_char), intent(in) :: letters(:)
        character(:), allocatable :: text
        integer :: i, length
        length = size(letters)
        do i = 1, size(letters)
            if (letters(i) == c_null_char) then
                length = i - 1
                exit
            end if
        end do
        allocate (character(length) :: text)
        do i = 1, length
            text(i:i) = letters(i)
        end do
    end function

    pure function decimal(number) result(text)
        integer(int64), intent(in) :: number
        character(:), allocatable :: text
        character(20) :: digits
        write (digits, '(i0)') number
        text = trim(digits)
    end function

end module
